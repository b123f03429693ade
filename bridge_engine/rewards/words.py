"""Answers that are words: names, `even`, `(B)`, `no solution`."""

from __future__ import annotations

from bridge_engine.rewards.findings import Finding, right, unjudged, wrong
from bridge_engine.rewards.structure import Leaf, plain_words

_NAMES = "zero one two three four five six seven eight nine ten eleven twelve"
_NUMBERS = {name: str(number) for number, name in enumerate(_NAMES.split(" "))}
_ARTICLES = ("the ", "a ", "an ", "answer ", "option ", "choice ")
_SAME = {"none": "no solution", "no solutions": "no solution", "true": "yes", "false": "no"}


def compare(one: Leaf, other: Leaf) -> Finding:
    """At least one of the two is words."""
    mine, theirs = _plain(one), _plain(other)
    if mine == theirs or _NUMBERS.get(mine, mine) == _NUMBERS.get(theirs, theirs):
        return right("equal_words")
    if one.words and other.words and f" {mine} " in f" {theirs} ":
        return unjudged("prose")
    return wrong("other_words")


def _plain(leaf: Leaf) -> str:
    text = leaf.text if leaf.words else plain_words(leaf.text)
    for article in _ARTICLES:
        text = text.removeprefix(article)
    return _SAME.get(text, text)
