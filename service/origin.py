"""Who may ask: this machine's programs, and no web page that happens to be open in its browser.

A service on loopback is reached by every page the browser shows. It has no keys to tell them apart,
so two headers do that no page can forge:

- `Host` is the name in the page's address. A page that has its own name resolve to 127.0.0.1 (DNS
  rebinding) would pass for same-origin and read everything, but its name gives it away.
- `Origin` and `Sec-Fetch-Site` say where a request comes from. A page elsewhere may send what is as
  simple as a form without asking first: a job, an upload, a cancellation.

Programs send neither of the latter. (Starlette's TrustedHostMiddleware knows only the first, and
answers in plain text.)
"""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import ApiError, respond
from service.settings import Settings

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^][:/@\s]+)(:[0-9]*)?", re.IGNORECASE)
_LONGEST = 253
"""Characters of a host's name, as DNS has it: nothing longer is looked at, or kept in the cache."""
_HINT = "set BRIDGE_ALLOWED_HOSTS to the names it is reached under, separated by commas"


class OriginMiddleware:
    """Answers 403 to requests under a name that is not the service's, and to those of web pages
    elsewhere; 400 to those that leave open under which. Plain ASGI: it does not buffer streams."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._names = {"localhost", settings.host.lower(), *settings.allowed_hosts}
        self._anywhere = settings.host in ("0.0.0.0", "::")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await respond(Request(scope), refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) > 1 or not (hosts or scope["http_version"] == "1.0"):
            return ApiError(
                400,
                "broken_host",
                f"the request has {len(hosts) or 'no'} Host headers; send exactly one",
                param="Host",
            )
        given = hosts[0] if hosts else ""
        host = _name(given)
        if host is None or not (self._named(host) or self._own_network(host)):
            return ApiError(
                403,
                "foreign_host",
                f"this service is not reached under the name {given!r}; use 127.0.0.1 or "
                f"localhost, or {_HINT}",
                param="Host",
                given=given,
            )
        if (origin := headers.get("origin")) is not None:
            page = _name(_netloc(origin))
            if page is None or not (page == host or self._named(page)):
                return _foreign(f"a web page at {origin!r}", "Origin", origin)
        elif headers.get("sec-fetch-site") == "cross-site" and not _follows_a_link(scope, headers):
            return _foreign("a web page elsewhere", "Sec-Fetch-Site", "cross-site")
        return None

    def _named(self, name: str) -> bool:
        """Is it this machine, or a name that was given to the service? Ports do not matter: whoever
        may open one of this machine need not go through a browser."""
        address = _address(name)
        return name in self._names or (address is not None and address.is_loopback)

    def _own_network(self, name: str) -> bool:
        """Listening everywhere, it is also called by addresses, which nobody can have point
        elsewhere, and by names of its own network (`api`, in Docker Compose): no name server of the
        internet answers for one without a dot."""
        return self._anywhere and (_address(name) is not None or "." not in name)


@lru_cache(256)  # every request asks, mostly for the same few
def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def _name(host: str) -> str | None:
    """The host without its port and brackets; None where it is not one."""
    found = _HOST.fullmatch(host)
    name = found[1].strip("[]").lower() if found else None
    return name if name and len(name) <= _LONGEST else None


def _netloc(origin: str) -> str:
    """The host and port of a web page's Origin; empty for `null` and for what is none."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return ""
    return parts.netloc if parts.scheme in ("http", "https") else ""


def _follows_a_link(scope: Scope, headers: Headers) -> bool:
    """Somebody clicked: the page that had the link sees nothing of the answer."""
    return (
        scope["method"] in ("GET", "HEAD")
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
    )


def _foreign(who: str, header: str, given: str) -> ApiError:
    return ApiError(
        403,
        "foreign_origin",
        f"{who} may not use this service; if it belongs to it, {_HINT}, and its own name with them",
        param=header,
        given=given,
    )
