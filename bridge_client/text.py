"""Texts of the service's, as they are shown: they can neither steer a terminal nor tear a table."""

from __future__ import annotations

import re

from rich import markup

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
BUT_LINES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def plain(text: str, *, lines: bool = False) -> str:
    """The text with its control characters escaped; with `lines`, for a text of several, line ends
    and tabs stay."""
    pattern = BUT_LINES if lines else CONTROL
    return pattern.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def escape(text: str) -> str:
    """The same inside rich markup, where its brackets are brackets."""
    return markup.escape(plain(text))
