"""What a caller gave, looked at before anything is sent: where no request can hold it, a sentence
that names it instead of an error out of the HTTP library's depths."""

from __future__ import annotations

import ipaddress
import json
from typing import Any
from urllib.parse import quote

import httpx

from bridge_client.errors import UsageError


def address(url: str) -> str:
    """The service's URL, without a slash at its end."""
    try:
        parsed = httpx.URL(url)
        good = parsed.scheme in ("http", "https") and bool(parsed.host)
    except httpx.InvalidURL:
        good = False
    if not good:
        raise UsageError(
            f"{url!r} is no address of a service: write --url or BRIDGE_URL as "
            "http://127.0.0.1:8000"
        )
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    """Does the address stay on this machine? Then no proxy of the environment (HTTP_PROXY,
    ALL_PROXY) may be asked: it would look for the service on its own machine."""
    host = httpx.URL(url).host
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def header(what: str, value: str) -> str:
    """A header's value."""
    if not (value.isascii() and value.isprintable() and value == value.strip()):
        raise UsageError(
            f"the {what} {value!r} cannot be sent: it goes into a header, which takes ASCII "
            "letters, digits and signs alone"
        )
    return value


def segment(name: str) -> str:
    """An id or a name as one part of a path, whatever is in it."""
    if not isinstance(name, str) or not name:
        raise UsageError(f"{name!r} is no id and no name: it must be a text that is not empty")
    return quote(text(name), safe="@")


def text(value: str) -> str:
    """A text that can be sent. Bytes of a command line or a pipe that are no UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{value[:60]!a} cannot be sent: it is not UTF-8 text") from None
    return value


def body(value: Any) -> bytes:
    """A JSON body."""
    try:
        written = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"what is asked for cannot be written as JSON: {error}") from None
    try:
        return written.encode()
    except UnicodeEncodeError as error:
        at = ascii(written[max(0, error.start - 20) : error.end + 20])
        raise UsageError(f"what is asked for is not UTF-8 text: … {at} …") from None
