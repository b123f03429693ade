r"""Judging what needs no mathematics: plain numbers and equal strings. Microseconds, no sympy.

`judge` answers only where the answer is beyond doubt and defers (None) otherwise. Whatever it
answers, math-verify answers too; a property test holds the two together. The one exception is
deliberate: numbers in scientific notation, which math-verify 0.9 reads wrongly (`8.7e8` as
8.7·e·8; `1.325 \times 10^{-27}` and `5 \times 10^{-30}` as equal). Those are judged here.
"""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"
_DECIMAL = re.compile(rf"(?P<sign>[+-]?)(?:\\?\$)?(?P<number>{_DIGITS}(?:\.\d+)?|\.\d+)")
_SLASH = re.compile(r"(?P<sign>[+-]?)(?P<over>\d+)/(?P<under>\d+)")
_FRAC = re.compile(r"(?P<sign>[+-]?)\\[dt]?frac\{(?P<over>-?\d+)\}\{(?P<under>\d+)\}")
_SCIENTIFIC = re.compile(
    r"(?P<mantissa>[+-]?\d+(?:\.\d+)?)"
    r"(?:[eE](?P<e>[+-]?\d{1,3})|\s*(?:\\times|\\cdot|\*|×)\s*10\^(?:\{(?P<braced>[+-]?\d{1,3})\}"
    r"|(?P<bare>\d)))"
)

_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)

_MOST_DIGITS = 15
"""Longer numbers are left to math-verify: floats of 15 digits still compare exactly there."""

_CLEARLY_APART = Fraction(1, 10_000)
"""math-verify rounds to 6 decimals: numbers nearer than this are left to it unless equal."""

_SCIENTIFIC_TOLERANCE = Fraction(1, 1_000_000)
"""Relative: equal to six significant digits."""


def judge(gold: str, stated: str) -> bool | None:
    """Is `stated` (both cleaned) the answer `gold`? None: somebody else has to say."""
    if gold == stated and _has_meaning(gold):
        return True
    scientific = _judge_scientific(gold, stated)
    if scientific is not None:
        return scientific
    one, other = plain_number(gold), plain_number(stated)
    if one is None or other is None:
        return None
    if one == other:
        return True
    return False if abs(one - other) > _CLEARLY_APART else None


def plain_number(text: str) -> Fraction | None:
    r"""The value of `-3`, `1,250.5`, `\$12`, `3/4`, `\frac{3}{4}`; None for anything else."""
    if sum(map(str.isdecimal, text)) > _MOST_DIGITS or not text.isascii():
        return None
    if found := _DECIMAL.fullmatch(text):
        value = Fraction(found["number"].replace(",", ""))
    elif found := _SLASH.fullmatch(text) or _FRAC.fullmatch(text):
        if int(found["under"]) == 0:
            return None
        value = Fraction(int(found["over"]), int(found["under"]))
    else:
        return None
    return -value if found["sign"] == "-" else value


def _has_meaning(text: str) -> bool:
    """Strings of which math-verify too says that they equal themselves: it finds no answer at all
    where braces do not match, and none in bare punctuation."""
    depth = 0
    for token in _BRACES.findall(text):
        depth += (token == "{") - (token == "}")
        if depth < 0:
            return False
    return depth == 0 and any(map(str.isalnum, text))


def _judge_scientific(gold: str, stated: str) -> bool | None:
    """Judges where at least one side is in scientific notation and both are numbers."""
    one, other = _scientific(gold), _scientific(stated)
    if one is None and other is None:
        return None
    one = plain_number(gold) if one is None else one
    other = plain_number(stated) if other is None else other
    if one is None or other is None:
        return None
    return abs(one - other) <= _SCIENTIFIC_TOLERANCE * abs(one)


def _scientific(text: str) -> Fraction | None:
    if not text.isascii() and "×" not in text:
        return None
    found = _SCIENTIFIC.fullmatch(text)
    if found is None or len(found["mantissa"]) > 2 * _MOST_DIGITS:
        return None
    exponent = int(found["e"] or found["braced"] or found["bare"])
    return Fraction(found["mantissa"]) * Fraction(10) ** exponent
