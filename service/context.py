"""What the routes share: the application's parts as dependencies, and what may be asked for."""

from __future__ import annotations

import unicodedata
from typing import Annotated, cast

from fastapi import Depends, Header, Request
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

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


def is_plain(character: str) -> bool:
    """Does it neither end a line nor steer what shows it?"""
    return unicodedata.category(character) not in ("Cc", "Zl", "Zp") and character not in _TURNS


def _one_line(text: str) -> str:
    """Names are shown in terminals, where a control character is a command."""
    for place, character in enumerate(text):
        if not is_plain(character):
            what = {"code": f"U+{ord(character):04X}", "place": place + 1}
            raise PydanticCustomError(
                "control_character",
                "a name is one line of text; its character {place} is {code}, a control character",
                what,
            )
    return text


_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Let text be shown in another order than it is in."""
OneLine = Annotated[str, AfterValidator(_one_line)]
"""A name that somebody gave."""

LARGEST_INT = 2**63 - 1
"""What the databases can compare a number with."""
TEXT = r"^[^\x00]*$"
"""Pattern of query parameters that the databases can compare a text with."""
