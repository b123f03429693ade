r"""The fast judge of leaves: plain numbers and equal normal forms. Microseconds, no sympy.

It answers only where the answer is beyond doubt and defers otherwise. Whatever it says, the slow
judge says too; a property test holds the two together.
"""

from __future__ import annotations

from fractions import Fraction

from bridge_engine.rewards import numbers
from bridge_engine.rewards.findings import DEFERRED, Finding, right, wrong
from bridge_engine.rewards.normalise import key, normal
from bridge_engine.rewards.numbers import Number


def leaf(gold: str, stated: str, tolerance: float | None = None) -> Finding:
    """Judges two values in normal form. `tolerance`: relative, of a measured gold answer."""
    if gold == stated or key(gold) == key(stated):
        return right("equal")
    one, other = numbers.read(gold), numbers.read(stated)
    if one is None or other is None:
        return DEFERRED
    return compared(one, other, tolerance)


def compared(one: Number, other: Number, tolerance: float | None) -> Finding:
    """Judges two numbers."""
    if one.value == other.value:
        return right("equal_number")
    if tolerance is not None:
        near = abs(one.value - other.value) <= Fraction(tolerance) * abs(one.value)
        return right("within_tolerance") if near else wrong("out_of_tolerance")
    return right("equal_rounded") if numbers.same(one, other) else wrong("other_number")


def judge(gold: str, stated: str) -> bool | None:
    """Is `stated` the answer `gold`, as far as one can tell from two numbers or equal texts? None:
    somebody else has to say."""
    one, other = normal(gold), normal(stated)
    if not any(map(str.isalnum, one)):
        return None
    return leaf(one, other).value
