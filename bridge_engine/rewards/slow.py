r"""The slow judge of leaves: math-verify's parser, sympy, and comparisons of our own.

Only for the child process (`bridge_engine.rewards.child`): what runs here may hang or eat memory.
math-verify reads the LaTeX. What it reads is then compared here where its own way of comparing is
known to fail: constants by their value to 30 digits, relative to their size (it calls 1/2004! and
1/2006! equal); functions by their values at random points; equations up to a factor. The rest, sets
with conditions and the like, is left to `math_verify.verify`.
"""

from __future__ import annotations

import random
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from bridge_engine.rewards import fast, numbers
from bridge_engine.rewards.findings import Finding, right, unjudged, wrong
from bridge_engine.rewards.numbers import Number

_DIGITS = 40
_EXACT = 1e-30
"""Relative difference of two exact expressions that counts as none."""
_FLOAT = 1e-9
"""The same, where decimals were computed with."""
_DECIMAL = re.compile(r"\d\.\d|(?<!\d)\.\d")
_WHOLE = re.compile(r"\\[lr]?floor|\\lceil|!|\\binom|\(-1\)\^|\\cos|\\sin|\\bmod|\\mod|i\^")
_RELATION = re.compile(r"=|<|>|\\le(?![a-z])|\\ge(?![a-z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\^\\circ")
_SUBSCRIPT = re.compile(r"_\{\\text\{(\w+)\}\}")
_GAMMA = re.compile(r"\\gamma(?![a-z])")
_POINTS = 4


def leaf(gold: str, stated: str, tolerance: float | None = None) -> Finding:
    """Judges two values in normal form; the fast judge first."""
    found = fast.leaf(gold, stated, tolerance)
    return mathematics(gold, stated, tolerance) if found.deferred else found


def mathematics(gold: str, stated: str, tolerance: float | None = None) -> Finding:
    """Judges two values by computing, even where it takes none."""
    if _RELATION.search(gold) and _RELATION.search(stated):
        return _relations(gold, stated)
    one, other = read(gold), read(stated)
    if one is None:
        return unjudged("unreadable_gold")
    if other is None:
        return wrong("unreadable_answer")
    try:
        found = _compared(one, other, gold, stated, tolerance)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # whatever sympy chokes on; math-verify may still know
        found = None
    return found or _math_verify(one, other)


@lru_cache(maxsize=256)
def read(text: str) -> Any:
    """The sympy object that math-verify reads; None where it finds only a string, or nothing."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse
    from sympy import Basic, MatrixBase

    # Units are off: they would take the m of 6m, which may be a mass.
    config = LatexExtractionConfig(
        normalization_config=NormalizationConfig(malformed_operators=True, nits=True)
    )
    boxed = "\\boxed{" + _readable(text) + "}"
    found = parse(boxed, extraction_config=[config], parsing_timeout=None)
    return next((item for item in found if isinstance(item, Basic | MatrixBase)), None)


def _readable(text: str) -> str:
    """A normal form as the parser likes it."""
    text = _SUBSCRIPT.sub(r"_{\1}", text).replace("\\hbar", "h_{b}")
    text = _GAMMA.sub("g_{g}", text)  # before a bracket it would be read as the gamma function
    text = text.replace("\\text{", "\\mathrm{").replace("$", "")
    text = _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    return text.replace("\\begin{matrix}", "\\begin{pmatrix}").replace(
        "\\end{matrix}", "\\end{pmatrix}"
    )


def _math_verify(one: Any, other: Any) -> Finding:
    from math_verify import verify

    # verify is not symmetric: the gold answer comes first.
    same = bool(verify([one], [other], timeout_seconds=None))
    return right("equal_value") if same else wrong("other_value")


def _compared(
    one: Any, other: Any, gold: str, stated: str, tolerance: float | None
) -> Finding | None:
    from sympy import Expr, nan, zoo

    if not isinstance(one, Expr) or not isinstance(other, Expr):
        return None
    one, other = _calm(one), _calm(other)
    if one.has(zoo, nan):
        return unjudged("unreadable_gold")  # no answer divides by 0: it has been misread
    if one.free_symbols or other.free_symbols:
        return _functions(one, other, gold, stated)
    return _constants(one, other, gold, stated, tolerance)


def _calm(expression: Any) -> Any:
    """Functions without values become symbols, as derivatives do; sums and limits are computed."""
    from sympy import Derivative, Symbol
    from sympy.core.function import AppliedUndef

    expression = expression.doit()
    # By name alone: the parser takes x for complex where the answer has an i, else for real
    unknown = expression.atoms(AppliedUndef, Derivative) | expression.free_symbols
    return expression.xreplace({u: Symbol(f"{u}") for u in unknown})


def _constants(
    one: Any, other: Any, gold: str, stated: str, tolerance: float | None
) -> Finding | None:
    mine, theirs = one.evalf(_DIGITS), other.evalf(_DIGITS)
    if not (mine.is_number and theirs.is_number and mine.is_finite and theirs.is_finite):
        return None
    apart, size = abs(mine - theirs), max(abs(mine), abs(theirs))
    if tolerance is not None and apart <= tolerance * abs(mine):
        return right("within_tolerance")
    for text, value in ((gold, theirs), (stated, mine)):
        written = numbers.read(text)
        if written is not None and written.rounded and value.is_real:
            beside = numbers.read(stated if text is gold else gold)
            exact = beside or Number(_fraction(value))
            found = fast.compared(*(written, exact) if text is gold else (exact, written), None)
            if found.value or beside:
                return found
    computed = bool(_DECIMAL.search(gold) or _DECIMAL.search(stated))
    if numbers.read(gold) or numbers.read(stated):
        computed = computed and not (_whole(gold) or _whole(stated))
    if apart <= (_FLOAT if computed and not _plain(gold, stated) else _EXACT) * size:
        return right("equal_value")
    if size < 1e-50 and (mine.is_zero or theirs.is_zero or 1 in (mine._prec, theirs._prec)):
        return None  # nothing but rounding is left of one of them
    return wrong("out_of_tolerance" if tolerance is not None else "other_value")


def _plain(gold: str, stated: str) -> bool:
    return numbers.read(gold) is not None and numbers.read(stated) is not None


def _whole(text: str) -> bool:
    number = numbers.read(text)
    return number is not None and number.places is None and number.value.denominator == 1


def _fraction(value: Any) -> Fraction:
    from sympy import Rational

    exact = Rational(str(value))
    return Fraction(int(exact.p), int(exact.q))


def _functions(one: Any, other: Any, gold: str, stated: str) -> Finding | None:
    """Compares two expressions by their values at random points."""
    from sympy import Abs, sign

    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    computed = bool(_DECIMAL.search(gold) or _DECIMAL.search(stated))
    rng = random.Random(0)
    positive = _agree(
        one, other, symbols, [_positive(rng, symbols) for _ in range(_POINTS)], computed
    )
    if positive is None:
        return None
    if not positive:
        if _WHOLE.search(f"{gold} {stated}"):
            whole = [[rng.randint(2, 9) for _ in symbols] for _ in range(_POINTS + 2)]
            if _agree(one, other, symbols, whole, computed):
                return (
                    _math_verify(one, other)
                    if not _integer_names(symbols)
                    else right("equal_value")
                )
        return wrong("other_value")
    mixed = [[v * rng.choice((-1, 1)) for v in _positive(rng, symbols)] for _ in range(_POINTS)]
    negative = [[-v for v in _positive(rng, symbols)]]
    elsewhere = mixed + negative
    if _agree(one, other, symbols, elsewhere, computed, real_alone=True) is not False:
        return right("equal_value")
    if one.has(Abs, sign) != other.has(Abs, sign):
        return wrong("other_value")
    found = _math_verify(one, other)
    return found if found.value else unjudged("equal_in_part")


def _integer_names(symbols: list[Any]) -> bool:
    """Letters by which everybody means whole numbers."""
    return all(re.match(r"[i-nI-NK](_|$)", str(symbol)) for symbol in symbols)


def _positive(rng: random.Random, symbols: list[Any]) -> list[Any]:
    from sympy import Float

    return [Float(rng.uniform(0.2, 2.8), _DIGITS) for _ in symbols]


def _agree(
    one: Any,
    other: Any,
    symbols: list[Any],
    points: list[list[Any]],
    computed: bool,
    *,
    real_alone: bool = False,
) -> bool | None:
    """Are the values the same at all points at which both have one? None: at none of them."""
    limit = 1e-7 if computed else 1e-20
    seen = 0
    for point in points:
        at = dict(zip(symbols, point, strict=True))
        mine, theirs = one.evalf(_DIGITS, subs=at), other.evalf(_DIGITS, subs=at)
        mine, theirs = mine.subs(at).evalf(_DIGITS), theirs.subs(at).evalf(_DIGITS)
        if mine.is_number and theirs.is_number and mine.is_finite and theirs.is_finite:
            if real_alone and not (mine.is_real and theirs.is_real):
                continue  # roots of negative numbers have two values, and each writing its own
            seen += 1
            if abs(mine - theirs) > limit * max(abs(mine), abs(theirs), 1e-12):
                return False
    return True if seen else None


def _relations(gold: str, stated: str) -> Finding:
    """Two equations are the same if one is the other times a factor that is no variable's."""
    sides = [re.split(r"(=|<|>|\\le(?![a-z]) ?|\\ge(?![a-z]) ?)", text) for text in (gold, stated)]
    if any(len(parts) != 3 for parts in sides):
        return _math_verify_texts(gold, stated)
    signs = [parts[1].strip() for parts in sides]
    read_sides = [[read(parts[0]), read(parts[2])] for parts in sides]
    if any(side is None for side in read_sides[0]):
        return unjudged("unreadable_gold")
    if any(side is None for side in read_sides[1]):
        return wrong("unreadable_answer")
    try:
        one, other = (_calm(left) - _calm(right) for left, right in read_sides)
        symbols = sorted(one.free_symbols | other.free_symbols, key=str)
        rng = random.Random(1)
        ratios = []
        for _ in range(_POINTS + 1):
            at = dict(zip(symbols, _positive(rng, symbols), strict=True))
            below = other.subs(at).evalf(_DIGITS)
            ratios.append((one.subs(at) / below).evalf(_DIGITS))
        first = ratios[0]
        if all(r.is_number and r.is_finite for r in ratios) and first != 0:
            if all(abs(r - first) <= 1e-15 * abs(first) for r in ratios):
                return _same_sense(signs, first)
            if "=" in signs and _polynomials(one, other):
                return wrong("other_value")
    except (MemoryError, RecursionError):
        raise
    except Exception:  # not expressions; math-verify may know
        pass
    return _math_verify_texts(gold, stated)


def _same_sense(signs: list[str], ratio: Any) -> Finding:
    flipped = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "="}
    want = signs[1] if ratio > 0 or signs[0] == "=" else flipped[signs[1]]
    return right("equal_value") if signs[0] == want else wrong("other_value")


def _polynomials(one: Any, other: Any) -> bool:
    symbols = one.free_symbols | other.free_symbols
    return bool(symbols) and all(
        e.is_polynomial(*symbols) and len(e.free_symbols) > 1 for e in (one, other)
    )


def _math_verify_texts(gold: str, stated: str) -> Finding:
    one, other = read(gold), read(stated)
    if one is None:
        return unjudged("unreadable_gold")
    if other is None:
        return wrong("unreadable_answer")
    return _math_verify(one, other)
