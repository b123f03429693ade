"""What the routes share: the application's parts as dependencies, and what may be asked for."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Request

from service.settings import Settings
from service.store import Store


def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


def _store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


SettingsDep = Annotated[Settings, Depends(_settings)]
StoreDep = Annotated[Store, Depends(_store)]

LARGEST_INT = 2**63 - 1
"""What the databases can compare a number with."""
TEXT = r"^[^\x00]*$"
"""Pattern of query parameters that the databases can compare a text with."""
