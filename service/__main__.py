"""`python -m service`: brings the database up to date and serves the API.

`python -m service migrate` does the first alone. Exits with status 2 and one sentence when it
cannot start.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError

from bridge_http.addresses import obstacle
from bridge_http.heads import HTTP
from bridge_http.requests import UVICORN, set_up_logging
from service.app import create_app
from service.settings import Settings, explain, get_settings
from service.store import StoreUnavailable
from service.store.migrate import upgrade
from service.variables import unknown

log = logging.getLogger(__name__)

CANNOT_START = 2


class CannotStart(Exception):
    """Why not, and what to do, in one sentence."""


def main(arguments: list[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["serve", "migrate"], default="serve")
    command = parser.parse_args(arguments).command
    try:
        settings = _settings()
        if command == "serve":
            check_address(settings)
        _migrate(settings)
    except CannotStart as error:
        print(error, file=sys.stderr)
        return CANNOT_START
    if command == "serve":
        _serve(create_app(settings), settings)
    return 0


def _settings() -> Settings:
    try:
        return get_settings()
    except ValidationError as error:
        raise CannotStart(explain(error)) from None


def _migrate(settings: Settings) -> None:
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        upgrade(settings.database_url)
    except StoreUnavailable as error:
        raise CannotStart(error.message) from None
    except SQLAlchemyError as error:  # an option in the URL that the driver does not know, say
        said = str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0]
        raise CannotStart(
            f"BRIDGE_DATABASE_URL cannot be used ({said}); it must be sqlite:////ABSOLUTE/PATH or "
            "postgresql://USER:PASSWORD@HOST:PORT/NAME."
        ) from None
    except OSError as error:
        raise CannotStart(
            f"{settings.home} cannot be written ({error.strerror}); make it writable, or set "
            "BRIDGE_HOME to a folder that is."
        ) from None


def check_address(settings: Settings) -> None:
    """Raises `CannotStart` for a taken port, and for an address others can reach: there are no API
    keys, so whoever reaches the service may use it."""
    host, port = settings.host, settings.port
    if not (settings.on_loopback or settings.allow_unauthenticated):
        raise CannotStart(
            f"There are no API keys, so the service listens on loopback only, not on {host}: leave "
            "BRIDGE_HOST at 127.0.0.1, or set BRIDGE_ALLOW_UNAUTHENTICATED=1 where the network "
            "itself lets nobody else in (a compose network, say)."
        )
    if (reason := obstacle(host, port)) is not None:
        raise CannotStart(
            f"Port {port} on {host} cannot be used ({reason}): stop what listens there, or set "
            "BRIDGE_PORT to another one."
        )


class _Server(uvicorn.Server):
    """Tells open event streams to end when the process is asked to: clients come back and go on."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.stopping.set()
        super().handle_exit(sig, frame)


def _serve(app: FastAPI, settings: Settings) -> None:
    set_up_logging()
    for sentence in unknown(os.environ):
        log.warning(sentence)
    logging.getLogger("alembic").setLevel("WARNING")
    config = uvicorn.Config(
        *(app, settings.host, settings.port), http=HTTP, timeout_graceful_shutdown=10, **UVICORN
    )
    _Server(app, config).run()


if __name__ == "__main__":
    raise SystemExit(main())
