"""`python -m service`: brings the database up to date and serves the API.

`python -m service migrate` does the first alone. Exits with status 2 and one sentence when it
cannot start.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import socket
import sys
from types import FrameType

import httpx
import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from sqlalchemy.exc import ArgumentError

from service.app import create_app
from service.datasets.upload import UploadLimits
from service.settings import Settings, get_settings
from service.store import StoreUnavailable
from service.store.migrate import upgrade

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
            check_address(settings.host, settings.port)
        _migrate(settings)
    except CannotStart as error:
        print(error, file=sys.stderr)
        return CANNOT_START
    if command == "serve":
        _serve(create_app(settings), settings)
    return 0


def _settings() -> Settings:
    try:
        settings = get_settings()
        UploadLimits()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "BRIDGE_" + "_".join(str(part) for part in first["loc"]).upper()
        where = f"{name}: " if first["loc"] else ""
        raise CannotStart(f"The settings cannot be used: {where}{first['msg']}.") from None
    if httpx.URL(settings.inference_url).scheme not in ("http", "https"):
        raise CannotStart(
            f"BRIDGE_INFERENCE_URL is {settings.inference_url!r}; it must be an address such as "
            "http://127.0.0.1:8001."
        )
    return settings


def _migrate(settings: Settings) -> None:
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        upgrade(settings.database_url)
    except StoreUnavailable as error:
        raise CannotStart(error.message) from None
    except (ArgumentError, ModuleNotFoundError) as error:  # no URL, or of an unknown database
        raise CannotStart(
            f"BRIDGE_DATABASE_URL cannot be used ({error}); it must be sqlite:///FILE or "
            "postgresql://USER:PASSWORD@HOST/NAME."
        ) from None
    except OSError as error:
        raise CannotStart(
            f"{settings.home} cannot be written ({error.strerror}); make it writable, or set "
            "BRIDGE_HOME to a folder that is."
        ) from None


def check_address(host: str, port: int) -> None:
    """Raises `CannotStart` for a taken port, and for an address others can reach: there are no API
    keys, so whoever reaches the service may use it."""
    if not _is_loopback(host) and os.environ.get("BRIDGE_ALLOW_UNAUTHENTICATED") != "1":
        raise CannotStart(
            f"There are no API keys, so the service listens on loopback only, not on {host}: leave "
            "BRIDGE_HOST at 127.0.0.1, or set BRIDGE_ALLOW_UNAUTHENTICATED=1 where the network "
            "itself lets nobody else in (a compose network, say)."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As uvicorn will: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CannotStart(
                f"Port {port} on {host} cannot be used ({error.strerror}): stop what listens "
                "there, or set BRIDGE_PORT to another one."
            ) from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Server(uvicorn.Server):
    """Tells open event streams to end when the process is asked to: clients come back and go on."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.stopping.set()
        super().handle_exit(sig, frame)


def _serve(app: FastAPI, settings: Settings) -> None:
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel("WARNING")  # or every probe of inference is a line
    logging.getLogger("alembic").setLevel("WARNING")
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, timeout_graceful_shutdown=10
    )
    _Server(app, config).run()


if __name__ == "__main__":
    raise SystemExit(main())
