r"""Units of measurement: `5\text{ cm}`, `15 cm^2`, `60 miles per hour`, `\$5`, `90^\circ`.

A unit is a factor and the powers of its dimensions, so that 5 m is 500 cm and not 5 cm. A word that
is no known unit (`apples`) counts things: it is compared as a word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_LENGTH, _MASS, _TIME, _MONEY, _ANGLE = "length", "mass", "time", "money", "angle"
_VOLUME_M3 = Fraction(1, 1000)

# name and its other spellings: (dimension powers, factor to the base unit)
_TABLE: dict[str, tuple[dict[str, int], Fraction]] = {}


def _define(names: str, factor: Fraction | int, **powers: int) -> None:
    for name in names.split():
        _TABLE[name] = (powers, Fraction(factor))


_define("m meter metre", 1, length=1)
_define("cm centimeter centimetre", Fraction(1, 100), length=1)
_define("mm millimeter millimetre", Fraction(1, 1000), length=1)
_define("km kilometer kilometre", 1000, length=1)
_define("nm nanometer", Fraction(1, 10**9), length=1)
_define("in inch inche", Fraction(254, 10_000), length=1)
_define("ft foot feet", Fraction(3048, 10_000), length=1)
_define("yd yard", Fraction(9144, 10_000), length=1)
_define("mi mile", Fraction(1_609_344, 1000), length=1)
_define("kg kilogram", 1, mass=1)
_define("g gram", Fraction(1, 1000), mass=1)
_define("mg milligram", Fraction(1, 10**6), mass=1)
_define("lb pound", Fraction(45_359_237, 10**8), mass=1)
_define("oz ounce", Fraction(45_359_237, 16 * 10**8), mass=1)
_define("ton", 1000, mass=1)
_define("s sec second", 1, time=1)
_define("ms millisecond", Fraction(1, 1000), time=1)
_define("min minute", 60, time=1)
_define("h hr hour", 3600, time=1)
_define("day", 86_400, time=1)
_define("week", 604_800, time=1)
_define("year yr", 31_557_600, time=1)
_define("month", 2_629_800, time=1)
_define("dollar usd buck", 1, money=1)
_define("cent ¢", Fraction(1, 100), money=1)
_define("degree deg ^\\circ", 1, angle=1)
_define("l liter litre", _VOLUME_M3, length=3)
_define("ml milliliter millilitre", _VOLUME_M3 / 1000, length=3)
_define("gallon gal", Fraction(3_785_411_784, 10**12), length=3)
_define("n newton", 1, mass=1, length=1, time=-2)
_define("j joule", 1, mass=1, length=2, time=-2)
_define("w watt", 1, mass=1, length=2, time=-3)
_define("ev electronvolt", Fraction(1_602_176_634, 10**28), mass=1, length=2, time=-2)
_define("hz hertz", 1, time=-1)
_define("pa pascal", 1, mass=1, length=-1, time=-2)
_PREFIXES = {
    "k": ("kilo", Fraction(10**3)),
    "M": ("mega", Fraction(10**6)),
    "G": ("giga", Fraction(10**9)),
    "m": ("milli", Fraction(1, 10**3)),
    "µ": ("micro", Fraction(1, 10**6)),
}
_PREFIXED = {"W": "watt", "Hz": "hertz", "Pa": "pascal", "J": "joule", "N": "newton",
             "V": "volt", "A": "ampere", "eV": "electronvolt"}  # fmt: skip
_ALSO_MEGA = {"Mm": "megametre", "Mg": "megagram"}
_ALSO_MICRO = {"m": "metre", "s": "second", "g": "gram", "L": "litre"}
_SYMBOL = re.compile(
    rf"(?<![A-Za-z\\])(?:([kMGmµ])({'|'.join(_PREFIXED)})|(µ)({'|'.join(_ALSO_MICRO)}))"
    r"(?![A-Za-z])|\bM[mg]\b"
)
"""Symbols in which a capital tells mega from milli: they are read before all else is made small."""
_MU = re.compile(r"μ|\\mu(?![A-Za-z])\s*")
_MICRO = re.compile(
    rf"(?<=[\d}})])\s*(?:[µμ]\s*|\\mu\s*(?=\\text\{{))(?:\\text\{{\s*)?"
    rf"({'|'.join([*_PREFIXED, *_ALSO_MICRO])})\s*\}}?$"
)


def with_micro(text: str) -> str:
    r"""`5 µW`, with the sign or the letter, and `5\,\mu\text{W}` in one form. Before a bare letter
    `\mu` is a letter itself.

    >>> with_micro("5 μW") == with_micro(r"5 \mu\text{W}") == r"5 \text{µW}"
    True
    """
    return _MICRO.sub(r" \\text{µ\1}", text)


def _spelled(symbol: re.Match[str]) -> str:
    if symbol[1]:
        return _PREFIXES[symbol[1]][0] + _PREFIXED[symbol[2]]
    return "micro" + _ALSO_MICRO[symbol[4]] if symbol[3] else _ALSO_MEGA[symbol[0]]


_define("mph", Fraction(1_609_344, 3_600_000), length=1, time=-1)
_define("kph", Fraction(1000, 3600), length=1, time=-1)
_define("rad radian", 1, radian=1)
_define("v volt", 1, volt=1)
_define("k kelvin", 1, kelvin=1)
_define("a ampere amp", 1, ampere=1)
_define("mol mole", 1, mole=1)

for _name in _PREFIXED.values():
    for _prefix, _times in _PREFIXES.values():
        _define(_prefix + _name, _times * _TABLE[_name][1], **_TABLE[_name][0])
_define("kw", 1000, mass=1, length=2, time=-3)
_define("megametre megameter", 10**6, length=1)
_define("megagram", 1000, mass=1)
_define("micrometre micrometer micron", Fraction(1, 10**6), length=1)
_define("microsecond", Fraction(1, 10**6), time=1)
_define("microgram", Fraction(1, 10**9), mass=1)
_define("microlitre microliter", _VOLUME_M3 / 10**6, length=3)

_PREPARE = (
    (re.compile(r"\\text\{([^{}]*)\}(?=\^)"), r" \1"),
    (re.compile(r"\\text\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\^\{(-?\d)\}"), r"^\1"),
    (re.compile(r"\bper\b"), "/"),
    (re.compile(r"\b(?:square|sq\.?)\s+([a-z]+)"), r"\1^2"),
    (re.compile(r"\b(?:cubic|cu\.?)\s+([a-z]+)"), r"\1^3"),
    (re.compile(r"([a-z]+)\s+squared\b"), r"\1^2"),
    (re.compile(r"([a-z]+)\s+cubed\b"), r"\1^3"),
    (re.compile(r"\\cdot|\*|\\times"), " "),
)
_PART = re.compile(r"\s*(/?)\s*(\^\\circ|[a-z¢]+)\.?(?:\^(-?\d))?")


@dataclass(frozen=True, slots=True)
class Unit:
    """`factor` of the base units of `powers`, or, where it is no unit we know, a `word`."""

    powers: tuple[tuple[str, int], ...] = ()
    factor: Fraction = Fraction(1)
    word: str = ""

    @property
    def known(self) -> bool:
        """Is it a unit of measurement?"""
        return not self.word


DOLLAR = Unit((("money", 1),))
DEGREE = Unit((("angle", 1),))


def read_unit(text: str) -> Unit | None:
    r"""The unit that `\text{cm}^{2}`, `km/h` or `apples` names; None if it is no name at all.

    >>> read_unit("square miles") == read_unit(r"\text{mi}^2")
    True
    >>> read_unit("MW") == read_unit("mW")
    False
    """
    plain = _SYMBOL.sub(_spelled, _MU.sub("µ", text.strip())).lower()
    for pattern, new in _PREPARE:
        plain = pattern.sub(new, plain)
    plain = re.sub(r"\s+", " ", plain).strip(" .")
    if not plain or len(plain) > 80:
        return None
    powers: dict[str, int] = {}
    factor = Fraction(1)
    place = 0
    while place < len(plain):
        found = _PART.match(plain, place)
        meaning = found and _lookup(found[2])
        if not found or meaning is None:
            return Unit(word=_word(plain)) if re.fullmatch(r"[a-z][a-z /'-]*", plain) else None
        place = found.end()
        power = int(found[3] or 1) * (-1 if found[1] else 1)
        for name, count in meaning[0].items():
            powers[name] = powers.get(name, 0) + power * count
        factor *= meaning[1] ** power
    return Unit(tuple(sorted((n, c) for n, c in powers.items() if c)), factor)


def _lookup(name: str) -> tuple[dict[str, int], Fraction] | None:
    return _TABLE.get(name) or (
        _TABLE.get(name[:-1]) if len(name) > 2 and name[-1] == "s" else None
    )


def _word(text: str) -> str:
    """`apples` and `apple` are one word."""
    return text[:-1] if text.endswith("s") and len(text) > 3 else text
