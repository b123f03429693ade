"""What the routes share: the application's parts as dependencies, and what may be asked for."""

from __future__ import annotations

from typing import Annotated, cast

from fastapi import Depends, Header, Request
from pydantic import AfterValidator

from bridge_engine.spec.base import one_line
from service.settings import Settings
from service.store import Store


def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


def _store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


SettingsDep = Annotated[Settings, Depends(_settings)]
StoreDep = Annotated[Store, Depends(_store)]


def _project(
    store: StoreDep,
    bridge_project: Annotated[
        str | None,
        Header(pattern=r"^[\x21-\x7e]{1,64}$", description="The project's id; default: `default`."),
    ] = None,
) -> str | None:
    return None if bridge_project is None else store.project(bridge_project).id


ProjectDep = Annotated[str | None, Depends(_project)]
"""The id in the header `Bridge-Project`, if there is one; 404 if there is no such project."""


OneLine = Annotated[str, AfterValidator(one_line)]
"""A name that somebody gave."""

LARGEST_INT = 2**63 - 1
"""What the databases can compare a number with."""
TEXT = r"^[^\x00]*$"
"""Pattern of query parameters that the databases can compare a text with."""
