r"""Other ways of writing an answer: what a model might as well have written, and meant the same."""

from __future__ import annotations

import re
from fractions import Fraction

from bridge_engine.rewards import numbers
from bridge_engine.rewards.normalise import normal
from bridge_engine.rewards.structure import Group, Leaf, Span, parse


def number(value: Fraction) -> list[str]:
    """A number in every usual notation."""
    n, d = value.numerator, value.denominator
    sign = "-" if n < 0 else ""
    found = [f"{n}/{d}", rf"\frac{{{n}}}{{{d}}}", rf"{sign}\dfrac{{{abs(n)}}}{{{d}}}"]
    found += [rf"$\frac{{{2 * n}}}{{{2 * d}}}$", rf"\left({n}/{d}\right)"]
    if d == 1:
        found += [str(n), f"{n}.0", f"{n:,}", f"{sign}0{abs(n)}", rf"\text{{{n}}}", f"**{n}**"]
        found += [
            f"{n:,}".replace(",", r",\!"),
            f"{n:,}".replace(",", "{,}"),
            f"−{-n}" if sign else f"+{n}",
        ]
    elif abs(n) > d:
        whole, rest = divmod(abs(n), d)
        found += [rf"{sign}{whole}\frac{{{rest}}}{{{d}}}", f"{sign}{whole} {rest}/{d}"]
    if (decimal := _decimal(value)) is not None:
        found += [decimal, f"{decimal}{'0' if '.' in decimal else '.00'}", rf"\({decimal}\)"]
        found += _scientific(decimal)
    return found


def _decimal(value: Fraction) -> str | None:
    """Its decimals, where they end within 12."""
    scaled = value * 10**12
    if scaled.denominator != 1:
        return None
    digits = str(abs(scaled.numerator)).rjust(13, "0")
    text = f"{digits[:-12]}.{digits[-12:]}".rstrip("0").rstrip(".")
    return f"-{text}" if value < 0 else text


def _scientific(decimal: str) -> list[str]:
    sign, digits = ("-", decimal[1:]) if decimal[0] == "-" else ("", decimal)
    whole, _, part = digits.partition(".")
    power = len(part)
    mantissa = (whole + part).lstrip("0") or "0"
    return [
        f"{sign}{mantissa}e-{power}",
        rf"{sign}{mantissa} \times 10^{{-{power}}}",
        rf"{sign}{mantissa}\cdot10^{{-{power}}}",
    ]


def of(answer: str) -> list[str]:
    """Other writings of any gold answer. The last one takes mathematics, where there is one."""
    node = parse(normal(answer))
    spaced = re.sub(r"(?<=[,+=])", " ", answer)
    found = [rf"${answer}$", spaced, answer.replace(r"\frac", r"\dfrac")]
    found.append(re.sub(r"(?<!\\left)\((?=[^()]*\))([^()]*)\)", r"\\left(\1\\right)", answer))
    found.append(answer.replace(r"\pi", "π").replace(r"\le ", "≤").replace(r"\infty", "∞"))
    if isinstance(node, Leaf) and (value := numbers.read(node.text)):
        found += number(value.value)
    elif isinstance(node, Leaf) and not node.words and not node.base and "=" not in node.text:
        found.append(_computed(node.text))
    elif isinstance(node, Group) and node.kind in ("list", "set") and len(node.items) > 1:
        items = _items(node)
        if items:
            found += [
                ", ".join(items[::-1]),
                rf"\{{{', '.join(items)}\}}",
                r" \text{ and } ".join(items),
            ]
    elif isinstance(node, Span):
        found += _span(node)
    return found


def _computed(text: str) -> str:
    return rf"\frac{{2\left({text}\right)}}{{2}}"


def _items(group: Group) -> list[str]:
    if any(not isinstance(item, Leaf) or item.name or item.unit for item in group.items):
        return []
    return [item.text for item in group.items if isinstance(item, Leaf)]


def _span(span: Span) -> list[str]:
    low, high = ("\\le" if c else "<" for c in (span.low_closed, span.high_closed))
    if span.low == "-\\infty":
        return [] if span.high == "\\infty" else [f"x {high} {span.high}"]
    if span.high == "\\infty":
        return [f"x {low.replace('<', '>').replace('le', 'ge')} {span.low}"]
    return [f"{span.low} {low} x {high} {span.high}"]
