"""Whose requests are answered: those that call this server by one of its own names.

A web page can make its own domain name point to 127.0.0.1 (DNS rebinding) and so reach a server on
loopback from the browser of somebody who merely visits it. The browser then still sends the page's
name as `Host`; here such a request ends, before any route sees it. So does one that a page sends to
the address itself without being able to read the answer: the browser names the page in `Origin`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from inference.errors import error_body

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class OwnHostsOnly:
    """Refuses requests whose `Host`, or `Origin` if there is one, is neither loopback's nor one of
    `hosts`: with status 403.

    Listening everywhere (0.0.0.0 or :: is among `hosts`) it is also called by addresses, and by
    names without a dot (`inference`, in Docker Compose): no name server of the internet answers for
    those.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str] = ()) -> None:
        self._app = app
        self._hosts = {*LOOPBACK, *map(_bracketed, hosts)}
        self._anywhere = not self._hosts.isdisjoint({"0.0.0.0", "[::]"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        foreign = self._foreign(Headers(scope=scope)) if scope["type"] == "http" else None
        if foreign is None:
            return await self._app(scope, receive, send)
        message = (
            f"This server does not answer to {foreign!r}, by which or from whose page it was "
            f"called: use {', '.join(sorted(self._hosts))}, or add the name to "
            "BRIDGE_ALLOWED_HOSTS."
        )
        refusal = JSONResponse(error_body(message, "PermissionDeniedError", 403), 403)
        return await refusal(scope, receive, send)

    def _foreign(self, headers: Headers) -> str | None:
        """The name that is not ours, None if all are."""
        host = _name(headers.get("host", ""))
        if not (host in self._hosts or (self._anywhere and _is_local(host))):
            return host
        origin = headers.get("origin")  # programs send none
        if origin is None or _name(origin.partition("//")[2]) in {host, *self._hosts}:
            return None
        return origin


def _name(host: str) -> str:
    """A `Host` header without its port; an IPv6 address keeps its brackets."""
    name, colon, port = host.lower().rpartition(":")
    return name if colon and port.isdecimal() else host.lower()


def _is_local(name: str) -> bool:
    """Is it an address, or a name without a dot?"""
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return bool(name) and "." not in name
    return True


def _bracketed(host: str) -> str:
    host = host.strip().lower()
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
