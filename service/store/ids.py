"""Names for new things: unique, and sorting by the time they were given."""

from __future__ import annotations

import difflib
import secrets
import time
from collections.abc import Iterable

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32, lower case: no letter that looks like a digit; sorts alike in every
collation."""


def new_id(prefix: str) -> str:
    """`PREFIX_` + 11 digits of time (microseconds) + 5 random ones; later ids are greater."""
    return f"{prefix}_{_digits(time.time_ns() // 1000, 11)}{_digits(secrets.randbits(25), 5)}"


def nearest_id(given: str, ids: Iterable[str]) -> str | None:
    """The one that was mistyped, or None. Ids of one day are half alike: but for two letters or so
    they must be the same, or a job that was deleted would be taken for a neighbour of its."""
    return next(iter(difflib.get_close_matches(given, list(ids), n=1, cutoff=0.85)), None)


def _digits(number: int, width: int) -> str:
    return "".join(_ALPHABET[(number >> shift) & 31] for shift in range(5 * (width - 1), -1, -5))
