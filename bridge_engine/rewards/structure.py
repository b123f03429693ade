r"""What an answer is made of: one value, several, an interval, an equation.

`parse` takes a normal form apart where its meaning is beyond doubt and leaves the rest, the leaves,
as text for others to judge. Linear in the answer's length, for a nesting of at most `DEEPEST`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from bridge_engine.rewards import numbers
from bridge_engine.rewards.units import DEGREE, DOLLAR, Unit, read_unit, with_micro

_LONGEST_WITH_UNIT = 200
DEEPEST = 8
"""Levels of brackets that are taken apart; what is nested deeper stays a leaf."""
MOST_ITEMS = 200
"""Items of a list that is taken apart."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value, in normal form, without what is said about it."""

    text: str
    name: str = ""
    """`x` of `x=5`."""
    unit: Unit | None = None
    percent: bool = False
    base: str = ""
    """`8` of `52_8`."""
    words: bool = False
    """`text` is words, in lower case, and no mathematics."""
    bare: str = ""
    """Where a lone letter behind a number was left in `text` (5m): the same without it …"""
    bare_unit: Unit | None = None
    """… and the unit which that letter may be."""


@dataclass(frozen=True, slots=True)
class Group:
    """Several values: `list`, `set` and `union` know no order, `tuple`, `ratio`, `matrix` do."""

    kind: str
    items: tuple[Node, ...]
    shape: tuple[int, int] = (0, 0)
    name: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """An interval, as such or as an inequality; its ends are leaves' texts."""

    low: str
    high: str
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True, slots=True)
class Relation:
    """An equation or inequality that gives no name a value: `2x-y=3`."""

    left: str
    sign: str
    right: str

    @property
    def text(self) -> str:
        """As one normal form."""
        return f"{self.left}{self.sign}{self.right}"


Node = Leaf | Group | Span | Relation

_TOKEN = re.compile(r"\\\\|\\[{}|]|\\[A-Za-z]+|\\.|[()\[\]{}]|.", re.DOTALL)
_OPENS = frozenset({"(", "[", "{", "\\{", "\\lfloor", "\\lceil", "\\langle", "\\begin"})
_CLOSES = frozenset({")", "]", "}", "\\}", "\\rfloor", "\\rceil", "\\rangle", "\\end"})
_SIGNS = frozenset({"=", "<", ">", "\\le", "\\ge", "\\ne", "\\in", "\\approx", "\\equiv"})
_JOIN = re.compile(r"\\text\{,?\s*(?:and|or)\s*,?\}|(?<=[\s\d)}\]])(?:and|or)(?=[\s\d(\\])|;")
_NAME = re.compile(
    r"(?:\\angle\s*)?(?:[A-Za-z]{1,3}|\\(?!text|frac|sqrt)[A-Za-z]+|\\text\{[^{}]*\})"
    r"(?:_\{[^{}]*\})?'*(?:\([^()=<>]*\))?(?:_\{[^{}]*\})?|\|[A-Za-z]{1,3}\||\\angle[A-Za-z_{}\d ]+"
)
_NAMES = re.compile(r"\((?:[A-Za-z]|\\[a-z]+)(?:, ?(?:[A-Za-z]|\\[a-z]+))+\)")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])|(?<=.)[-+]")
_BASE = re.compile(r"(-?[0-9A-Fa-f]+(?:\.[0-9]+)?)_\{(?:\\text\{)?(\w+)\}?\}")
_PERCENT = re.compile(r"(?:\\?%|\s*\\text\{\s*percent\s*\}|\s*percent)\s*$")
_DOLLAR = re.compile(r"^([+-]?)\s*(?:\\\$|USD)\s*([+-]?)")
_TEXT_UNIT = re.compile(r"\\text\{([^{}]*)\}(?:\^\{?-?\d\}?)?")
_BARE_UNIT = re.compile(
    r"\s*([A-Za-z][A-Za-z .'-]*(?:\^\{?-?\d\}?)?(?:/[A-Za-z]+(?:\^\{?-?\d\}?)?)?)$"
)
_PROSE = re.compile(r"[A-Za-z]{4,}|[A-Za-z]{2,} [A-Za-z]{2,}")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_ALL_REALS = frozenset({"\\mathbb{R}", "\\R", "\\Reals", "(-\\infty,\\infty)"})
_EMPTY = frozenset({"\\emptyset", "\\{\\}"})


def parse(text: str, *, depth: int = 0, thousands: bool = True) -> Node:
    """The structure of a normal form. Not `thousands`: `100,200` is a list."""
    text = _bare(text)
    if not text or depth > DEEPEST or (thousands and numbers.read(text)):
        return Leaf(text)
    if text.replace(" ", "") in _ALL_REALS:
        return Span("-\\infty", "\\infty", False, False)
    tokens = _tokens(text)
    if tokens is None:
        return Leaf(text)
    parts = _split_list(tokens)
    if len(parts) > 1:
        return _list([p for p in parts if p.strip()], depth, thousands)
    sides, signs = _split_at(tokens, _SIGNS)
    if signs:
        return _related(sides, signs, text, depth, thousands)
    pieces, cups = _split_at(tokens, frozenset({"\\cup"}))
    if cups:
        return Group("union", _all(pieces, depth, thousands))
    ratio, colons = _split_at(tokens, frozenset({":"}))
    if colons and all(ratio):
        return Group("ratio", _all(ratio, depth, thousands))
    return _bracketed(text, tokens, depth, thousands) or _leaf(text)


# --------------------------------------------------------------------------- taking apart


def _tokens(text: str) -> list[tuple[str, int, int]] | None:
    """(token, place, depth before it); None where brackets do not match."""
    found, level = [], 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _CLOSES:
            level -= 1
            if level < 0:
                return None
        found.append((token, match.start(), level))
        if token in _OPENS:
            level += 1
    return found if level == 0 else None


def _split_list(tokens: list[tuple[str, int, int]]) -> list[str]:
    """The parts between commas, semicolons, `and` and `or` outside all brackets."""
    text = "".join(token for token, _, _ in tokens)
    flat = "".join(token if level == 0 else "\x00" * len(token) for token, _, level in tokens)
    shown = _mask_text(text, flat)
    cuts = [(m.start(), m.end()) for m in _JOIN.finditer(shown)]
    cuts += [(i, i + 1) for i, c in enumerate(shown) if c == ","]
    if not cuts or len(cuts) > MOST_ITEMS:
        return [text]
    parts, last = [], 0
    for start, end in sorted(cuts):
        parts.append(text[last:start].strip())
        last = end
    return [part for part in [*parts, text[last:].strip()] if part] or [text]


def _mask_text(text: str, flat: str) -> str:
    r"""`flat` with the words and/or of `\text{ or }` shown again, which stand in braces."""
    for found in re.finditer(r"\\text\{,?\s*(?:and|or)\s*,?\}", text):
        if flat[found.start()] == "\\":
            flat = flat[: found.start()] + found[0] + flat[found.end() :]
    return flat


def _split_at(
    tokens: list[tuple[str, int, int]], at: frozenset[str]
) -> tuple[list[str], list[str]]:
    """(the parts, the separators between them), outside all brackets."""
    parts, found = [""], []
    for token, _, level in tokens:
        if level == 0 and token in at:
            found.append(token)
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts], found


def _all(parts: list[str], depth: int, thousands: bool) -> tuple[Node, ...]:
    return tuple(parse(p, depth=depth + 1, thousands=thousands) for p in parts)


def _list(parts: list[str], depth: int, thousands: bool) -> Node:
    items: list[Node] = []
    for item in _all(parts, depth, thousands):
        items += item.items if isinstance(item, Group) and item.kind == "list" else (item,)
    if len(items) == 1:
        return items[0]
    last = items[-1]
    if isinstance(last, Leaf) and last.unit is not None:  # 3, 4 and 5 cm
        items = [
            replace(i, unit=last.unit) if isinstance(i, Leaf) and i.unit is None else i
            for i in items
        ]
    return Group("list", tuple(items))


def _related(sides: list[str], signs: list[str], text: str, depth: int, thousands: bool) -> Node:
    """Assignments, memberships and inequalities."""
    named = bool(_NAME.fullmatch(sides[0]))
    if all(sign in ("=", "\\approx") for sign in signs):
        if sides[0] == "" and len(signs) == 1:
            return parse(sides[1], depth=depth + 1, thousands=thousands)
        if _NAMES.fullmatch(sides[0]) and len(signs) == 1:  # (x,y)=(1,2)
            values = parse(sides[1], depth=depth + 1, thousands=thousands)
            return _named_values(sides[0][1:-1].split(","), values)
        if named:
            return _with_name(
                parse(sides[-1], depth=depth + 1, thousands=thousands), sides[0].replace(" ", "")
            )
        return Relation(sides[0], "=", sides[-1]) if len(signs) == 1 else Leaf(text)
    if signs == ["\\in"] and named:
        return parse(sides[1], depth=depth + 1, thousands=thousands)
    order = [{"<": -1, "\\le": -1, ">": 1, "\\ge": 1}.get(sign, 0) for sign in signs]
    closed = [sign in ("\\le", "\\ge") for sign in signs]
    if len(set(order)) > 1 or order[0] == 0:
        return Leaf(text)
    if order[0] > 0:
        sides, closed = sides[::-1], closed[::-1]
    if len(sides) == 3 and _NAME.fullmatch(sides[1]):
        return Span(sides[0], sides[2], closed[0], closed[1])
    if len(sides) == 2 and _NAME.fullmatch(sides[0]) and not _NAME.fullmatch(sides[1]):
        return Span("-\\infty", sides[1], False, closed[0])
    if len(sides) == 2 and _NAME.fullmatch(sides[1]) and not _NAME.fullmatch(sides[0]):
        return Span(sides[0], "\\infty", closed[0], False)
    if len(sides) == 2:
        return Relation(sides[0], "\\le " if closed[0] else "<", sides[1])
    return Leaf(text)


def _with_name(node: Node, name: str) -> Node:
    if isinstance(node, Leaf):
        return replace(node, name=name)
    if isinstance(node, Group) and node.kind == "list":
        return replace(node, items=tuple(_with_name(item, name) for item in node.items))
    return node


def _bracketed(
    text: str, tokens: list[tuple[str, int, int]], depth: int, thousands: bool
) -> Node | None:
    """Tuples, intervals, sets and matrices: whatever one pair of brackets is around."""
    first, last = tokens[0][0], tokens[-1][0]
    if text.startswith("\\begin{matrix}") and text.endswith("\\end{matrix}"):
        rows = [row for row in text[14:-12].split("\\\\") if row.strip()]
        cells = [row.split("&") for row in rows]
        if "\\begin" in text[14:] or len({len(row) for row in cells}) != 1:
            return None
        flat = [cell for row in cells for cell in row]
        return Group("matrix", _all(flat, depth, thousands), (len(cells), len(cells[0])))
    if first not in ("(", "[", "\\{", "\\langle") or last not in (")", "]", "\\}", "\\rangle"):
        return None
    if any(level == 0 for _, _, level in tokens[1:-1]):
        return None
    inner = text[len(first) : len(text) - len(last)].strip()
    inside = _tokens(inner)
    if inside is None:
        return None
    parts = _split_list(inside)
    if first == "\\{":
        if "|" in inner or ":" in inner:
            return None
        node = parse(inner, depth=depth + 1, thousands=False) if inner else Group("set", ())
        items = node.items if isinstance(node, Group) and node.kind == "list" else (node,)
        return Group("set", items if inner else ())
    if len(parts) < 2:
        return parse(inner, depth=depth + 1) if (first, last) == ("(", ")") else None
    if len(parts) == 2 and (first == "[") + (last == "]") and "\\pm" not in inner:
        return Span(parts[0], parts[1], first == "[", last == "]")
    return Group("tuple", _all(parts, depth, False))


# --------------------------------------------------------------------------- leaves


def _bare(text: str) -> str:
    """Without blanks, a closing full stop and pairs of braces around the whole."""
    text = text.strip()
    for _ in range(DEEPEST):
        before = text
        if text.endswith((".", ",", ";")) and not text.endswith(".."):
            text = text[:-1].rstrip()
        if text.startswith("{") and text.endswith("}") and text.find("}") == len(text) - 1:
            text = text[1:-1].strip()
        if text == before:
            break
    return text


def _leaf(text: str) -> Node:
    if text.replace(" ", "") in _EMPTY:
        return Group("set", ())
    if "\\pm" in text or "\\mp" in text:
        upper = text.replace("\\pm", "+").replace("\\mp", "-")
        lower = text.replace("\\pm", "-").replace("\\mp", "+")
        return Group("list", (_leaf(_signed(upper)), _leaf(_signed(lower))))
    if found := _BASE.fullmatch(text):
        return Leaf(found[1], base=found[2])
    percent = _PERCENT.search(text)
    if percent and percent.start():
        return Leaf(_bare(text[: percent.start()]), percent=True)
    if found := _DOLLAR.match(text):
        return Leaf(_signed(found[1] + found[2] + text[found.end() :].strip()), unit=DOLLAR)
    if text.endswith("^\\circ") and len(text) > 6 and not _FUNCTION.search(text):
        return Leaf(_unparenthesised(text[:-6]), unit=DEGREE)
    return _with_unit(text)


def _signed(text: str) -> str:
    return re.sub(r"(^|[(\[,])\+", r"\1", text)


def _with_unit(text: str) -> Leaf:
    if words := _as_words(text):
        return Leaf(words, words=True)
    text = with_micro(text)
    if (found := _TEXT_UNIT.search(text)) and found.start():
        unit = read_unit(text[found.start() :])
        body = text[: found.start()].rstrip(" \\")
        if unit is not None and body and not body.endswith(("_", "^", "{", "(")):
            return Leaf(_unparenthesised(body), unit=unit)
    found = _BARE_UNIT.search(text) if len(text) <= _LONGEST_WITH_UNIT else None
    body = text[: found.start()] if found else ""
    if found is None or not numbers.read(body):
        return Leaf(text)
    unit = read_unit(found[1])
    if unit is None:
        return Leaf(text)
    if len(found[1]) == 1:
        return Leaf(text, bare=body, bare_unit=unit) if unit.known else Leaf(text)
    if unit.known or _PROSE.search(found[1]):
        return Leaf(body, unit=unit)
    return Leaf(text)


def _as_words(text: str) -> str:
    """The words of an answer that is words: `\\text{Evelyn}`, `(B)`; "" for mathematics."""
    marked = text.startswith("\\text{") and text.find("}") == len(text) - 1
    inner = text[6:-1] if marked else text
    if _COMMAND.search(inner) or not re.search(r"[A-Za-z]", inner):
        return ""
    if not marked and (re.search(r"[\d^_=+*/]", inner) or not _PROSE.search(inner)):
        return ""
    return plain_words(inner)


def _named_values(names: list[str], values: Node) -> Node:
    """The values, with their names where these are not in their usual order: (y,x)=(1,2)."""
    names = [name.strip() for name in names]
    if not isinstance(values, Group) or values.kind != "tuple" or names == sorted(names):
        return values
    if len(names) != len(values.items) or not all(isinstance(v, Leaf) for v in values.items):
        return values
    pairs = zip(names, values.items, strict=True)
    return replace(values, kind="list", items=tuple(_with_name(v, name) for name, v in pairs))


def plain_words(text: str) -> str:
    """Words in lower case, without what only surrounds them."""
    text = re.sub(r"[^\w/'+<>=.,-]+|[.,](?!\d)", " ", text.replace("\\text", ""))
    return re.sub(r"\s*([<>=])\s*", r"\1", text).strip().lower()


def _unparenthesised(text: str) -> str:
    text = text.strip()
    if text.startswith("(") and text.endswith(")") and text.find(")") == len(text) - 1:
        return text[1:-1]
    return text
