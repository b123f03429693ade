r"""What a completion states as its final answer.

Strict on purpose: reward has to be earned by saying which answer is meant, not by mentioning the
right number somewhere. The first of these forms that is found counts:

1. the last whole `\boxed{…}` (braces balanced, not empty), wherever it is;
2. what follows the last `#` of the last line that has text: `#10` (the arithmetic family),
   `#### 72` (GSM8K). A heading such as `### Step 3` with text below it states nothing;
3. what follows `answer is` or `answer:` at the end of the last line that has text;
4. the whole completion, if it is one plain number.

Anything else states no answer, and neither does a box that only shows the form of one
(`\boxed{answer}`, `\boxed{…}`), nor what a completion repeats of its prompt. Takes time linear in
the completion's length, whatever is in it.
"""

from __future__ import annotations

import re

SHORTEST_ECHO = 16
"""Characters: what is shorter stands in an answer by chance."""

_BRACE = re.compile(r"\\[\\{}]|\\boxed\s*\{|[{}]")
_ANSWER_IS = re.compile(r"\banswer\b(?:\*\*|\s)*(?:is\b|:|=)\s*:?\s*(?P<answer>.+)", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"(?:\\text\{)?\s*[\[<(]?\s*(?:(?:your |the |final |insert |numerical |correct )*"
    r"(?:answer|result|number|solution|expression)(?: here)?|\.{2,}|…|\\l?dots|\\cdots|\?+|_+|"
    r"\\(?:boxed|square|Box))\s*[\])>]?\s*\}?",
    re.IGNORECASE,
)
_PLAIN_NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_MATH_THOUSANDS = re.compile(r"(?<=\d),\\!(?=\d{3})")
_LONGEST_PLACEHOLDER = 60
_LONGEST_LINE = 2_000
"""A last line longer than this many characters is prose or noise, not `The answer is …`."""


def stated_answer(completion: str, prompt: str | None = None) -> str | None:
    r"""The answer a completion states, cleaned; None if it states none.

    What it repeats of its `prompt`, word for word, states nothing.

    >>> stated_answer(r"so 3x = 6 and x is \boxed{2}.")
    '2'
    >>> stated_answer("12+3=15,15-5=10#10")
    '10'
    """
    if prompt and len(echo := prompt.strip()) >= SHORTEST_ECHO:
        completion = completion.replace(echo, "\n")
    boxed = _last_boxed(completion)
    if boxed is not None:
        return boxed
    line = _last_line(completion)
    if "#" in line:
        return clean(line.rpartition("#")[2]) or None
    if len(line) <= _LONGEST_LINE and (found := _ANSWER_IS.search(line)):
        return clean(found["answer"]) or None
    whole = clean(completion) if len(completion) <= _LONGEST_LINE else ""
    return whole if _PLAIN_NUMBER.fullmatch(whole) else None


def clean(answer: str) -> str:
    r"""An answer without what only surrounds it: space, `$…$` or `**…**`, a closing `.` or `,`.

    MATH's way of writing thousands, `29,\!322,\!216`, loses its separators: math-verify reads them
    as a product.
    """
    text = _MATH_THOUSANDS.sub("", answer).strip()
    while True:
        before = text
        for mark in ("$$", "$", "**"):
            if len(text) >= 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
                text = text[len(mark) : -len(mark)].strip()
        if text.endswith((".", ",")) and not text.endswith(".."):
            text = text.rstrip(", \t\n") if text.endswith(",") else text[:-1].rstrip()
        if text == before:
            return text


def _last_boxed(text: str) -> str | None:
    r"""The contents of the whole, non-empty `\boxed{…}` that opens last."""
    if "\\boxed" not in text:
        return None
    last: tuple[int, int] | None = None
    open_braces: list[tuple[int, bool]] = []  # (where its contents begin, is it a box)
    for found in _BRACE.finditer(text):
        token = found[0]
        if token.endswith("{") and token != "\\{":
            open_braces.append((found.end(), token != "{"))
        elif token == "}" and open_braces:
            start, is_box = open_braces.pop()
            if is_box and (last is None or start > last[0]) and _states(text, start, found.start()):
                last = (start, found.start())
    return clean(text[last[0] : last[1]]) or None if last else None


def _states(text: str, start: int, end: int) -> bool:
    """Is there an answer in the box, and not only the place for one?"""
    if end - start > _LONGEST_PLACEHOLDER:
        return True
    inside = text[start:end].strip()
    return bool(inside) and not _PLACEHOLDER.fullmatch(inside)


def _last_line(text: str) -> str:
    """The last line that has text."""
    return text.rstrip().rpartition("\n")[2].strip()
