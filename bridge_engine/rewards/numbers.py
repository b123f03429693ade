r"""Numbers as people write them, read exactly: `-3`, `1,250.5`, `3/4`, `1\frac{1}{2}`, `8.7e8`.

When are two written numbers the same? Exactly where they are equal, with one allowance: a decimal
of at least six significant digits also stands for the numbers that round to it, so that 0.333333 is
1/3 and 33.3333 is 100/3. 0.33 is not 1/3, and no decimal but itself is a whole number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"(?P<sign>[+-]?)(?P<number>{_DIGITS}(?:\.\d*)?|\.\d+)")
_REPEATING = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>\d*)\.(?P<fixed>\d*)\\overline\{(?P<again>\d+)\}"
)
_SLASH = re.compile(r"(?P<sign>[+-]?)(?P<over>\d+)/(?P<under>\d+)")
_FRAC = re.compile(r"(?P<sign>[+-]?)\\frac\{(?P<over>[+-]?[\d.]+)\}\{(?P<under>[+-]?[\d.]+)\}")
_MIXED = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>\d+)(?:\s*\\frac\{(?P<over>\d+)\}\{(?P<under>\d+)\}"
    r"|\s+(?P<slash>\d+)/(?P<below>\d+))"
)
_SCIENTIFIC = re.compile(
    r"(?P<sign>[+-]?)(?:(?P<mantissa>\d+(?:\.\d*)?|\.\d+)\s*(?:\\times|\\cdot|\*)\s*)?"
    r"10\^(?:\{(?P<braced>[+-]?\d{1,4})\}|(?P<bare>[+-]?\d{1,4}))"
)

MOST_DIGITS = 400
"""Longer numbers are not read here: nobody means them, and arithmetic on them is not free."""
ENOUGH_DIGITS = 6
"""Significant digits from which on a decimal stands for what rounds to it."""
_NOISE = Fraction(1, 10**12)
"""Relative error of a float that was computed, 0.30000000000000004, and written in full."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number and how exactly it was written."""

    value: Fraction
    places: int | None = None
    """Decimal places of a decimal (negative for 8.7e8); None: written without a point, exact."""
    digits: int = 0
    """Significant digits of a decimal."""

    @property
    def rounded(self) -> bool:
        """May it stand for numbers that round to it?"""
        return self.places is not None and self.digits >= ENOUGH_DIGITS

    def stands_for(self, value: Fraction) -> bool:
        """Does `value` round to this decimal?"""
        return (
            self.places is not None
            and 2 * abs(self.value - value) * Fraction(10) ** self.places <= 1
        )


def read(text: str) -> Number | None:
    """The number that a normal form spells; None where it is anything but one plain number."""
    if not text or len(text) > MOST_DIGITS or not text.isascii() or not _starts_a_number(text):
        return None
    text = text.strip("{}") if text[0] == "{" and text.count("{") == 1 else text
    if found := _DECIMAL.fullmatch(text):
        return _signed(found, _decimal(found["number"].replace(",", "")))
    if found := _SLASH.fullmatch(text):
        return _signed(found, _ratio(found["over"], found["under"]))
    if found := _FRAC.fullmatch(text):
        return _signed(found, _ratio(found["over"], found["under"]))
    if found := _MIXED.fullmatch(text):
        part = _ratio(found["over"] or found["slash"], found["under"] or found["below"])
        return _signed(found, part and Number(part.value + int(found["whole"])))
    if found := _SCIENTIFIC.fullmatch(text):
        exponent = int(found["braced"] or found["bare"])
        if abs(exponent) > MOST_DIGITS:
            return None
        one = _decimal(found["mantissa"] or "1")
        places = None if one.places is None else one.places - exponent
        value = one.value * Fraction(10) ** exponent
        return _signed(found, Number(value, places, one.digits))
    if found := _REPEATING.fullmatch(text):
        return _signed(found, _repeating(found))
    return None


def same(one: Number, other: Number) -> bool:
    """Are they the same number, given how they were written? Symmetric."""
    if one.value == other.value:
        return True
    for rounded, exact in ((one, other), (other, one)):
        if not rounded.rounded:
            continue
        apart = abs(rounded.value - exact.value)
        if rounded.digits >= 14 and apart <= _NOISE * abs(exact.value):
            return True
        if exact.places is not None and exact.digits < rounded.digits:
            continue  # the coarser decimal is the one that may stand for the finer
        if exact.value.denominator != 1 and rounded.stands_for(exact.value):
            return True
    return False


def _starts_a_number(text: str) -> bool:
    return text[0] in "0123456789+-.{" or text.startswith("\\frac")


def _decimal(text: str) -> Number:
    whole, point, part = text.partition(".")
    if not point or not part:
        return Number(Fraction(int(whole or "0")))
    digits = len((whole + part).lstrip("0"))
    return Number(Fraction(int((whole + part) or "0"), 10 ** len(part)), len(part), digits)


def _ratio(over: str, under: str) -> Number | None:
    if over.count(".") > 1 or under.count(".") > 1 or "." in (over.strip("+-"), under.strip("+-")):
        return None
    below = Fraction(under)
    return None if below == 0 else Number(Fraction(over) / below)


def _repeating(found: re.Match[str]) -> Number:
    fixed, again = found["fixed"], found["again"]
    shift = 10 ** len(fixed)
    value = int(found["whole"] or "0") + Fraction(int(fixed or "0"), shift)
    return Number(value + Fraction(int(again), (10 ** len(again) - 1) * shift))


def _signed(found: re.Match[str], number: Number | None) -> Number | None:
    if number is None or found["sign"] != "-":
        return number
    return Number(-number.value, number.places, number.digits)
