r"""Is a stated answer the gold answer? Part by part, each in the way its kind asks for.

`judge` takes both apart (`bridge_engine.rewards.structure`), pairs their parts and asks a judge of
leaves about each pair. Which judge is the caller's affair: the fast one says `needs_mathematics`
where it cannot tell, the slow one (`bridge_engine.rewards.slow`) computes. Since everything else is
the same, the two can differ only about leaves. Pure; what the judge of leaves says goes in and out.

All parts have to agree: naming several answers of which one is right is wrong, and so is a part of
the gold answer. Order counts in tuples and matrices, not in lists, sets and unions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

from bridge_engine.rewards import numbers, words
from bridge_engine.rewards.findings import Finding, right, unjudged, wrong
from bridge_engine.rewards.normalise import has_euler, key, normal
from bridge_engine.rewards.structure import Group, Leaf, Node, Relation, Span, parse
from bridge_engine.rewards.units import DEGREE, Unit

JudgeOfLeaves = Callable[[str, str], Finding]
"""(gold, stated), both normal forms of single values."""

_SYMMETRIC = frozenset({"list", "set", "union"})
_SPECIAL = re.compile(r"\\setminus|\\cap|\\\{|\\ne|\\equiv|\\forall|\\backslash")
_GROUPED_DIGITS = re.compile(r"\d,\d{3}(?!\d)")
_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")
_MOST_PAIRS = 2_500


def judge(gold: str, stated: str, leaf: JudgeOfLeaves) -> Finding:
    """Compares two answers (not whole completions)."""
    one, other = _normals(gold, stated)
    if key(one) == key(other) and any(map(str.isalnum, one)):
        return right("equal")
    first, second = parse(one), parse(other)
    found = _nodes(first, second, leaf)
    if found.value is not True and _GROUPED_DIGITS.search(one + " " + other):
        # 100,200 is a number to one and a list to the other
        first, second = parse(one, thousands=False), parse(other, thousands=False)
        if isinstance(first, Group) and isinstance(second, Group):
            again = _nodes(first, second, leaf)
            return again if again.value else found
    return found


def _normals(gold: str, stated: str) -> tuple[str, str]:
    """Both normal forms. `2e-1` is 0.2, unless the other side speaks of Euler's number: beside
    `2e - 1` or `-1+2e` it is 2·e − 1."""
    one, other = normal(gold), normal(stated)
    if has_euler(one) and not has_euler(other):
        other = normal(stated, scientific=False)
    elif has_euler(other) and not has_euler(one):
        one = normal(gold, scientific=False)
    return one, other


def _nodes(one: Node, other: Node, leaf: JudgeOfLeaves) -> Finding:
    one, other = _unwrapped(one), _unwrapped(other)
    if isinstance(one, Leaf) and isinstance(other, Leaf):
        return _leaves(one, other, leaf)
    if isinstance(one, Group) and isinstance(other, Group):
        return _groups(one, other, leaf)
    one, other = _as_span(one, other), _as_span(other, one)
    if isinstance(one, Span) and isinstance(other, Span):
        return _spans(one, other, leaf)
    if _is_relation(one) and _is_relation(other) and Relation in (type(one), type(other)):
        return leaf(written(one), written(other))
    for node in (one, other):
        if isinstance(node, Leaf) and _SPECIAL.search(node.text):
            return leaf(written(one), written(other))
    many = isinstance(one, Group) != isinstance(other, Group)
    return wrong("other_count" if many and _lists(one, other) else "other_kind")


def _lists(one: Node, other: Node) -> bool:
    return any(isinstance(n, Group) and n.kind in _SYMMETRIC for n in (one, other))


def _unwrapped(node: Node) -> Node:
    """A set or list of one is the one."""
    while isinstance(node, Group) and node.kind in _SYMMETRIC and len(node.items) == 1:
        node = node.items[0]
    return node


def _as_span(node: Node, beside: Node) -> Node:
    """Beside an interval, a pair is the open interval: `(1,2)` and `1<x<2`."""
    if (
        isinstance(beside, Span)
        and isinstance(node, Group)
        and node.kind == "tuple"
        and len(node.items) == 2
        and all(isinstance(item, Leaf) for item in node.items)
    ):
        low, high = (written(item) for item in node.items)
        return Span(low, high, False, False)
    return node


def _is_relation(node: Node) -> bool:
    named = isinstance(node, Leaf) and bool(node.name)
    return named or isinstance(node, Relation | Span)


# --------------------------------------------------------------------------- several


def _groups(one: Group, other: Group, leaf: JudgeOfLeaves) -> Finding:
    kinds = {one.kind, other.kind}
    if "ratio" in kinds:
        return _ratios(one, other, leaf) if kinds == {"ratio"} else wrong("other_kind")
    if "matrix" in kinds and (kinds == {"matrix"} or kinds == {"matrix", "tuple"}):
        if kinds == {"matrix"} and one.shape != other.shape:
            return wrong("other_count")
        if kinds != {"matrix"} and 1 not in (one if one.kind == "matrix" else other).shape:
            return wrong("other_kind")
        return _in_order(one.items, other.items, leaf)
    if "tuple" in kinds:
        if not kinds <= {"tuple", "list"}:
            return wrong("other_kind")
        if kinds == {"tuple", "list"} and any(
            not isinstance(item, Leaf) for item in (*one.items, *other.items)
        ):
            return wrong("other_kind")
        return _named_in_order(one, other, leaf)
    if "matrix" in kinds:
        return wrong("other_kind")
    if _names(one) != _names(other) and 0 in (_names(one), _names(other)):
        return _named_in_order(one, other, leaf)  # x=1, y=2 and 1, 2
    return _in_any_order(one.items, other.items, leaf, repeats="set" not in kinds)


def _ratios(one: Group, other: Group, leaf: JudgeOfLeaves) -> Finding:
    """Term by term; 3:4 may be meant by 6:8 if it is a ratio, and not if it is a time."""
    found = _in_order(one.items, other.items, leaf)
    terms = [[numbers.read(written(item)) for item in group.items] for group in (one, other)]
    mine, theirs = ([t.value for t in row if t] for row in terms)
    if found.value or not len(one.items) == len(other.items) == len(mine) == len(theirs):
        return found
    proportional = all(a * theirs[0] == b * mine[0] for a, b in zip(mine, theirs, strict=True))
    return unjudged("proportional") if proportional and all(mine + theirs) else found


def _names(group: Group) -> int:
    names = {item.name for item in group.items if isinstance(item, Leaf) and item.name}
    return len(names) if len(names) != 1 else 0


def _named_in_order(one: Group, other: Group, leaf: JudgeOfLeaves) -> Finding:
    """Item by item. Named ones may stand in another order than the one that was asked for: then
    `y=1, x=2` may be the pair (1, 2) or the pair (2, 1)."""
    found = _in_order(one.items, other.items, leaf)
    by_name = _in_order(_by_name(one), _by_name(other), leaf)
    if found.value == by_name.value:
        return found
    if _names(one) and _names(other):
        return by_name
    return unjudged("order_of_names")


def _by_name(group: Group) -> Sequence[Node]:
    names = [item.name for item in group.items if isinstance(item, Leaf) and item.name]
    if len(names) != len(group.items):
        return group.items
    return [item for _, item in sorted(zip(names, group.items, strict=True), key=lambda p: p[0])]


def _in_order(one: Sequence[Node], other: Sequence[Node], leaf: JudgeOfLeaves) -> Finding:
    if len(one) != len(other):
        return wrong("other_count")
    return _all(zip(one, other, strict=True), leaf)


def _all(pairs: Iterable[tuple[Node, Node]], leaf: JudgeOfLeaves) -> Finding:
    """Right if all are, wrong as soon as one is."""
    open_question: Finding | None = None
    for one, other in pairs:
        found = _nodes(one, other, leaf)
        if found.value is False:
            return found if found.reason.startswith("other_") else wrong("other_parts")
        if found.value is None and (open_question is None or open_question.deferred):
            open_question = found
    return open_question or right("equal_parts")


def _in_any_order(
    one: Sequence[Node], other: Sequence[Node], leaf: JudgeOfLeaves, *, repeats: bool
) -> Finding:
    """Is there a pairing in which every pair agrees? Not `repeats`: items may come twice."""
    if repeats and len(one) != len(other):
        return wrong("other_count")
    if len(one) * len(other) > _MOST_PAIRS:
        return unjudged("too_long")
    table = [[_nodes(a, b, leaf) for b in other] for a in one]
    if not repeats:
        columns = list(zip(*table, strict=True)) if table else []
        if bool(one) != bool(other):
            return wrong("other_count")
        lines = [*table, *columns]
        if all(any(f.value for f in line) for line in lines):
            return right("equal_parts")
        if all(any(f.value is not False for f in line) for line in lines):
            return _least_settled(table)
        return wrong("other_parts" if len(one) == len(other) else "other_count")
    if _pairs_up([[f.value is True for f in line] for line in table]):
        return right("equal_parts")
    if _pairs_up([[f.value is not False for f in line] for line in table]):
        return _least_settled(table)
    return wrong("other_parts")


def _least_settled(table: Sequence[Sequence[Finding]]) -> Finding:
    """What to say where it hangs on pairs that nobody has judged (yet)."""
    open_ones = [f for line in table for f in line if f.value is None]
    return next((f for f in open_ones if f.deferred), open_ones[0])


def _pairs_up(fits: Sequence[Sequence[bool]]) -> bool:
    """Can every row get a column of its own? (Kuhn's augmenting paths.)"""
    owner: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column, fit in enumerate(fits[row]):
            if fit and column not in seen:
                seen.add(column)
                if column not in owner or place(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(fits)))


def _spans(one: Span, other: Span, leaf: JudgeOfLeaves) -> Finding:
    ends = [(one.low, other.low), (one.high, other.high)]
    found = _all([(parse(a), parse(b)) for a, b in ends], leaf)
    closed = (one.low_closed, one.high_closed) == (other.low_closed, other.high_closed)
    return found if closed or found.value is False else wrong("other_ends")


# --------------------------------------------------------------------------- one


def _leaves(one: Leaf, other: Leaf, leaf: JudgeOfLeaves) -> Finding:
    if one.name and other.name and one.name != other.name:
        return _other_name(one, other, leaf)
    if one.words or other.words:
        return words.compare(one, other)
    if one.base and other.base and one.base != other.base:
        return wrong("other_base")
    if one.percent != other.percent:
        return _percent(one, other, leaf)
    if (one.unit or other.unit or one.bare_unit or other.bare_unit) is not None:
        return _measured(one, other, leaf)
    return leaf(one.text, other.text)


def _other_name(one: Leaf, other: Leaf, leaf: JudgeOfLeaves) -> Finding:
    """`f(n)=n` is `f(x)=x` and `y=2x` is `f(x)=2x`; `x=5` is not `y=5`."""
    if key(one.name) == key(other.text) and key(other.name) == key(one.text):
        return right("equal_parts")
    if not _LETTER.search(one.text) and not _LETTER.search(other.text):
        return wrong("other_variable")
    mine, theirs = (re.fullmatch(r"(\w+)\(([A-Za-z])\)", side.name) for side in (one, other))
    text = other.text
    if mine and theirs and mine[1] == theirs[1]:
        text = re.sub(rf"(?<![\\A-Za-z]){theirs[2]}(?![A-Za-z])", mine[2], text)
    elif not mine and not theirs:
        return leaf(written(one), written(other))
    return _leaves(replace(one, name=""), replace(other, name="", text=text), leaf)


def _percent(one: Leaf, other: Leaf, leaf: JudgeOfLeaves) -> Finding:
    """A percent sign on one side only may have been left out or worked in: 50 % is 50 or 0.5."""
    plain = leaf(one.text, other.text)
    number = numbers.read(one.text)
    if plain.value and number is not None and 0 < abs(number.value) < 1:
        return unjudged("percent_of_less_than_one")
    if plain.value:
        return plain
    hundredth = Fraction(1, 100)
    texts = (
        _scaled(one.text, hundredth) if one.percent else one.text,
        _scaled(other.text, hundredth) if other.percent else other.text,
    )
    worked_in = leaf(*texts)
    return worked_in if worked_in.value or plain.value is False else plain


def _measured(one: Leaf, other: Leaf, leaf: JudgeOfLeaves) -> Finding:
    one, other = _certain(one, other), _certain(other, one)
    mine, theirs = one.unit, other.unit
    if mine is None or theirs is None:
        if DEGREE in (mine, theirs) and "\\pi" in one.text + other.text:
            turn = Fraction(1, 180)
            texts = [
                f"{_scaled(side.text, turn)}\\pi" if side.unit == DEGREE else side.text
                for side in (one, other)
            ]
            return leaf(*texts)
        return leaf(one.text, other.text)
    if not mine.known or not theirs.known:
        found = leaf(one.text, other.text)
        words = mine.word.split(), theirs.word.split()
        alike = words[0][-1:] == words[1][-1:] and (
            words[0] == words[1] or 1 in map(len, words)  # red balls and balls, not blue balls
        )
        return unjudged("unknown_unit") if found.value and not alike else found
    if mine.powers != theirs.powers:
        return wrong("other_unit")
    if mine.factor == theirs.factor:
        return leaf(one.text, other.text)
    return leaf(one.text, _scaled(other.text, theirs.factor / mine.factor))


def _certain(one: Leaf, beside: Leaf) -> Leaf:
    """`5m` is five metres beside a measured or a plain number, and five times m elsewhere."""
    unit: Unit | None = one.bare_unit
    if unit is not None and (beside.unit or (not beside.bare and numbers.read(beside.text))):
        return replace(one, text=one.bare, unit=unit, bare="", bare_unit=None)
    return one


def _scaled(text: str, factor: Fraction) -> str:
    """The text of `factor` times a value."""
    number = numbers.read(text)
    if number is None:
        return f"\\frac{{({text})\\cdot {factor.numerator}}}{{{factor.denominator}}}"
    product = number.value * factor
    if number.places is not None:
        shift = 0
        while shift < 40 and (product * 10**shift).denominator != 1:
            shift += 1
        if shift < 40:
            whole = abs(product * 10**shift).numerator
            digits = str(whole).rjust(shift + 1, "0")
            sign = "-" if product < 0 else ""
            return sign + (f"{digits[:-shift]}.{digits[-shift:]}" if shift else digits)
    if product.denominator == 1:
        return str(product.numerator)
    return f"\\frac{{{product.numerator}}}{{{product.denominator}}}"


def written(node: Node) -> str:
    """A node as text again, for a judge that reads it whole."""
    if isinstance(node, Leaf):
        return f"{node.name}={node.text}" if node.name else node.text
    if isinstance(node, Relation):
        return node.text
    if isinstance(node, Span):
        left, close = "[" if node.low_closed else "(", "]" if node.high_closed else ")"
        return f"{left}{node.low},{node.high}{close}"
    inside = ", ".join(map(written, node.items))
    if node.kind == "union":
        return "\\cup ".join(map(written, node.items))
    if node.kind == "ratio":
        return ":".join(map(written, node.items))
    return {"set": f"\\{{{inside}\\}}", "list": inside}.get(node.kind, f"({inside})")
