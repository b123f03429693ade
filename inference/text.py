"""Tokens become text as they come: whole characters only, and nothing of a stop string.

A character may be spread over several tokens, and so may a stop string. What could still turn out
to be the beginning of one is held back until it is known not to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 4
"""Tokens before the new ones that are decoded with them: some tokenizers write a token differently
at the beginning of a text."""

_PATIENCE = 16
"""After so many tokens that make no whole character they are written as they are."""


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of these tokens, without special ones."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:  # what the next line would end in, at a fifth of the time
        return str(fast.decode(list(ids), skip_special_tokens=True))
    return str(
        tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


class TextStream:
    """The text of one completion. Feed it tokens with `push`, then call `finish` once."""

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), *, as_it_comes: bool = True
    ) -> None:
        """Where neither the text is wanted as it comes nor anything may stop it, all of it is
        decoded at the end."""
        self._tokenizer = tokenizer
        self._at_once = as_it_comes or bool(stop)
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._ids: list[int] = []
        self._begin = self._read = 0
        """Of the ids: where the context of the next decoding begins, and what is text already."""
        self._held = ""
        self.length = 0
        """Characters decoded so far, those held back included."""
        self.stopped = False
        """Has a stop string come? Then nothing more is written."""
        self.cut: int | None = None
        """Where in the text the stop string began."""

    def push(self, token: int) -> str:
        """The text that is certain now: possibly none."""
        self._ids.append(token)
        return self._add(self._decoded(last=False)) if self._at_once else ""

    def finish(self) -> str:
        """What was held back, once no token comes any more."""
        if self.stopped:
            return ""
        ready = self._add(self._decoded(last=True))
        held, self._held = self._held, ""
        return ready if self.stopped else ready + held

    def _decoded(self, last: bool) -> str:
        before = decode(self._tokenizer, self._ids[self._begin : self._read])
        whole = decode(self._tokenizer, self._ids[self._begin :])
        if len(whole) <= len(before):
            return ""
        waiting = len(self._ids) - self._read < _PATIENCE
        if whole.endswith(_UNFINISHED) and waiting and not last:
            return ""
        self._read = len(self._ids)
        self._begin = max(self._begin, self._read - _CONTEXT)
        return whole[len(before) :]

    def _add(self, new: str) -> str:
        if not new or self.stopped:
            return ""
        text = self._held + new
        start = self.length - len(self._held)
        self.length += len(new)
        found = min((i for s in self._stop if (i := text.find(s)) >= 0), default=None)
        if found is not None:
            self.stopped, self.cut, self._held = True, start + found, ""
            return text[:found]
        keep = _possible_beginning(text, self._stop, self._longest)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _possible_beginning(text: str, stop: Sequence[str], longest: int) -> int:
    """How many of the last characters may be the beginning of a stop string."""
    for size in range(min(longest - 1, len(text)), 0, -1):
        end = text[-size:]
        if any(s.startswith(end) for s in stop):
            return size
    return 0
