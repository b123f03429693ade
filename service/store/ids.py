"""Names for new things: unique, and sorting by the time they were given."""

from __future__ import annotations

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32, lower case: no letter that looks like a digit; sorts alike in every
collation."""


def new_id(prefix: str) -> str:
    """`PREFIX_` + 11 digits of time (microseconds) + 5 random ones; later ids are greater."""
    return f"{prefix}_{_digits(time.time_ns() // 1000, 11)}{_digits(secrets.randbits(25), 5)}"


def _digits(number: int, width: int) -> str:
    return "".join(_ALPHABET[(number >> shift) & 31] for shift in range(5 * (width - 1), -1, -5))
