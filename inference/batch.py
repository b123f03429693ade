"""Continuous batching on one base model: rows join and leave between two tokens.

`advance` does a bounded piece of work: at most PREFILL tokens of waiting prompts are read in, then
every row gets one token. So a long prompt never keeps the others waiting for longer than that.

Where a model's attention is more than torch's own over every token so far (sliding windows, say),
each row keeps transformers' own cache and is computed by itself: right, and slower.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from bridge_engine.forward.logits import head_logits
from bridge_engine.rollout.decoding import decoding, is_plain
from inference.cache import RowsCache, copies_of
from inference.errors import InferenceError
from inference.lora import LoraWeights
from inference.requests import Generation, Update
from inference.routing import Routing
from inference.sampling import TokenInfo, draw, token_info, uniforms
from inference.text import TextStream

PREFILL = 512
"""Prompt tokens that are read in between two decode steps."""
_SCORED = 128
"""Positions whose log-probabilities over the vocabulary are in memory together."""

log = logging.getLogger(__name__)

Tell = Callable[[Generation, "Update | InferenceError"], None]


@dataclass(slots=True, eq=False)
class _Row:
    """One choice that is being written."""

    generation: Generation
    index: int
    text: TextStream
    draws: random.Random
    last: int = 0
    """The newest token, whose key and value are not in the cache yet."""
    count: int = 0
    pending: list[tuple[TokenInfo, int]] = field(default_factory=list)
    """Tokens to be told of with the next text, and where in the text each begins."""
    cache: DynamicCache | None = None
    """Its own, where rows cannot share one."""


@dataclass(slots=True, eq=False)
class _Filling:
    """A prompt that is read in piece by piece."""

    generation: Generation
    cache: DynamicCache
    done: int = 0


class Batch:
    """The rows of one base model. Everything but `offer` and `waiting` belongs to one thread."""

    def __init__(
        self, model: Any, tokenizer: Any, end_ids: list[int], *, rows: int, places: int
    ) -> None:
        """At most `rows` rows; at most `places` tokens of all rows together are cached, each row
        counted as long as the longest may become. A request that alone is more is let in alone."""
        self.model = model
        self.tokenizer = tokenizer
        self.routing = Routing(model)
        self.waiting: deque[Generation] = deque()
        self._end_ids = frozenset(end_ids)
        self._most_rows, self._places = rows, places
        self._rows: list[_Row] = []
        self._filling: _Filling | None = None
        self._cache = RowsCache(model)
        self._device = next(model.parameters()).device
        self._plain = self._is_plain()

    @torch.inference_mode()
    def _is_plain(self) -> bool:
        cache = DynamicCache(config=self.model.config)
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self._device)
        self.model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
        return is_plain(self.model, cache)

    @property
    def idle(self) -> bool:
        """Is there nothing to do?"""
        return not (self._rows or self.waiting or self._filling)

    def running(self) -> list[Generation]:
        """Requests that have begun."""
        found = dict.fromkeys(row.generation for row in self._rows)
        if self._filling:
            found[self._filling.generation] = None
        return list(found)

    @torch.inference_mode()
    def advance(self, tell: Tell) -> None:
        """Reads in what may join, and writes one token of each row."""
        self._leave()
        self._join(tell)
        if self._rows:
            self._decode(tell)
        elif not self._filling:
            self._cache.clear()

    def fail(self, error: InferenceError, tell: Tell) -> None:
        """Ends every request that has begun with this error."""
        for generation in self.running():
            tell(generation, error)
        self._rows, self._filling = [], None
        self._cache.clear()

    # ------------------------------------------------------------------ joining and leaving

    def _leave(self) -> None:
        """Those that nobody waits for any more."""
        for place in range(len(self._rows) - 1, -1, -1):
            if self._rows[place].generation.cancelled:
                self._remove(place)
        if self._filling and self._filling.generation.cancelled:
            self._filling = None

    def _remove(self, place: int) -> None:
        """The last row takes this one's place, as it does in the cache."""
        if self._plain:
            self._cache.remove(place)
        self._rows[place] = self._rows[-1]
        self._rows.pop()

    def _join(self, tell: Tell) -> None:
        if self._filling is None:
            chosen = self._choose()
            if not chosen:
                return
            first = chosen[0]
            alone = len(chosen) == 1 and (
                not self._plain or first.params.echo or len(first.prompt) > PREFILL
            )
            if not alone:
                self._guard(chosen, tell, lambda: self._read_together(chosen, tell))
                return
            self._filling = _Filling(first, DynamicCache(config=self.model.config))
        filling = self._filling
        self._guard([filling.generation], tell, lambda: self._read_piece(filling, tell))

    def _guard(self, chosen: list[Generation], tell: Tell, read: Callable[[], None]) -> None:
        """What goes wrong with a prompt is its own affair."""
        try:
            read()
        except Exception as error:
            log.exception("a prompt could not be read")
            extra = self._plain and len(self._cache.lengths) != len(self._rows)
            if extra or not self._cache.whole:  # it broke off in the middle of a row
                self.fail(failure(error), tell)
            mine = set(chosen)
            for place in range(len(self._rows) - 1, -1, -1):
                if self._rows[place].generation in mine:
                    self._remove(place)
            self._filling = None
            for generation in chosen:
                tell(generation, failure(error))  # first: a cancelled one is told nothing more
                generation.cancelled = True

    def _choose(self) -> list[Generation]:
        """The first in line, and those behind it that may be read in together with it."""
        chosen: list[Generation] = []
        rows = len(self._rows)
        longest = max((_most(row.generation) for row in self._rows), default=0)
        widest = 0
        while self.waiting:
            next_one = self.waiting[0]
            if next_one.cancelled:
                self.waiting.popleft()
                continue
            rows += next_one.params.n
            longest = max(longest, _most(next_one))
            widest = max(widest, len(next_one.prompt))
            crowded = rows > self._most_rows or rows * longest > self._places
            if crowded and (self._rows or chosen):
                break  # it waits for others to leave
            apart = not self._plain or next_one.params.echo or len(next_one.prompt) > PREFILL
            if chosen and (apart or widest * (len(chosen) + 1) > PREFILL):
                break
            chosen.append(self.waiting.popleft())
            if apart:
                break
        return chosen

    # ------------------------------------------------------------------ reading prompts

    def _read_together(self, chosen: list[Generation], tell: Tell) -> None:
        """Several short prompts in one pass. They are padded behind their ends, where the causal
        mask lets no token look."""
        longest = max(len(g.prompt) for g in chosen)
        tokens_BL = torch.zeros(len(chosen), longest, dtype=torch.long)
        for place, generation in enumerate(chosen):
            tokens_BL[place, : len(generation.prompt)] = torch.tensor(generation.prompt)
        cache = DynamicCache(config=self.model.config)
        hidden_BLD = self._forward(
            tokens_BL.to(self._device), [g.lora for g in chosen], cache, torch.arange(longest)
        )
        ends = torch.tensor([len(g.prompt) - 1 for g in chosen], device=self._device)
        hidden_BD = hidden_BLD[torch.arange(len(chosen), device=self._device), ends]
        self._begin(chosen, hidden_BD, cache, tell)

    def _read_piece(self, filling: _Filling, tell: Tell) -> None:
        """The next PREFILL tokens of a long prompt."""
        generation, start = filling.generation, filling.done
        piece = generation.prompt[start : start + PREFILL]
        hidden_BLD = self._forward(
            torch.tensor([piece], device=self._device),
            [generation.lora],
            filling.cache,
            torch.arange(start, start + len(piece)),
        )
        if generation.params.echo:
            self._score_prompt(generation, start, hidden_BLD[0])
        filling.done += len(piece)
        if filling.done == len(generation.prompt):
            self._filling = None
            self._begin([generation], hidden_BLD[:, -1], filling.cache, tell)

    def _score_prompt(self, generation: Generation, start: int, hidden_LD: Tensor) -> None:
        """How likely the prompt's own tokens were; the first one has nothing before it."""
        prompt, found = generation.prompt, generation.prompt_logprobs
        if start == 0:
            found.append(TokenInfo(prompt[0], None))
        top = generation.params.logprobs or 0
        for begin in range(0, len(hidden_LD), _SCORED):
            part_SD = hidden_LD[begin : begin + _SCORED]
            with self._routed([generation.lora], len(part_SD)):
                logprobs_SV = torch.log_softmax(head_logits(self.model, part_SD).float(), -1)
            for offset, logprobs_V in enumerate(logprobs_SV):
                if (place := start + begin + offset + 1) < len(prompt):
                    found.append(token_info(prompt[place], logprobs_V, top))

    def _forward(
        self,
        tokens_BL: Tensor,
        loras: list[LoraWeights | None],
        cache: DynamicCache,
        positions_L: Tensor,
    ) -> Tensor:
        with self._routed(loras, tokens_BL.shape[1]):
            hidden_BLD: Tensor = self.model.base_model(
                input_ids=tokens_BL,
                position_ids=positions_L.to(self._device).expand(len(tokens_BL), -1),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return hidden_BLD

    def _routed(self, loras: list[LoraWeights | None], positions: int) -> Any:
        return self.routing.using(loras, positions)

    def _begin(
        self, chosen: list[Generation], hidden_BD: Tensor, cache: DynamicCache, tell: Tell
    ) -> None:
        """Prompts are read: their rows join, each with its first token."""
        made: list[_Row] = []
        sources: list[int] = []
        for place, generation in enumerate(chosen):
            copies = generation.params.n
            if self._plain:
                self._cache.append(cache, place, len(generation.prompt), copies)
            own = [None] * copies if self._plain else copies_of(cache, copies)
            for index in range(copies):
                text = TextStream(
                    self.tokenizer, generation.params.stop, as_it_comes=generation.stream
                )
                draws = uniforms(generation.seed, index)
                made.append(_Row(generation, index, text, draws, cache=own[index]))
                sources.append(place)
        first = len(self._rows)
        self._rows += made
        self._write(hidden_BD[torch.tensor(sources, device=self._device)], first, tell)

    # ------------------------------------------------------------------ writing

    def _decode(self, tell: Tell) -> None:
        """One token more of every row."""
        if not self._plain:
            hidden = [self._decode_alone(row) for row in self._rows]
            self._write(torch.cat(hidden), 0, tell)
            return
        mask = self._cache.step_mask()
        loras = [row.generation.lora for row in self._rows]
        tokens_R1 = torch.tensor([[row.last] for row in self._rows], device=self._device)
        with self._routed(loras, 1), decoding(self.model):
            hidden_RD = self.model.base_model(
                input_ids=tokens_R1,
                attention_mask=mask,
                position_ids=self._cache.positions_R[:, None],
                past_key_values=self._cache.cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
        self._cache.grown()
        self._write(hidden_RD, 0, tell)

    def _decode_alone(self, row: _Row) -> Tensor:
        assert row.cache is not None
        place = len(row.generation.prompt) + row.count - 1
        tokens_11 = torch.tensor([[row.last]], device=self._device)
        hidden_11D = self._forward(
            tokens_11, [row.generation.lora], row.cache, torch.tensor([place])
        )
        return hidden_11D[:, -1]

    def _write(self, hidden_RD: Tensor, first: int, tell: Tell) -> None:
        """Draws the next token of the rows from `first` on; those that end leave."""
        rows = self._rows[first:]
        with nullcontext() if not rows else self._routed([r.generation.lora for r in rows], 1):
            logits_RV = head_logits(self.model, hidden_RD)
        sound = torch.isfinite(logits_RV.amax(-1)).tolist()
        params = [row.generation.params for row in rows]
        numbers = [row.draws.random() for row in rows]
        tokens, logprobs_RV = draw(torch.nan_to_num(logits_RV), params, numbers)
        ended = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if not sound[place]:
                tell(row.generation, _not_a_number())
                row.generation.cancelled = True
                continue
            if (top := params[place].logprobs) is not None and token not in self._end_ids:
                info = token_info(token, logprobs_RV[place], top)
                row.pending.append((info, row.text.length))
            if self._took(row, token, tell):
                ended.append(first + place)
        for place in reversed(ended):
            self._remove(place)

    def _took(self, row: _Row, token: int, tell: Tell) -> bool:
        """Notes a row's new token and tells of it. Has the row ended?"""
        params = row.generation.params
        row.last, row.count = token, row.count + 1
        at_end = token in self._end_ids
        text = "" if at_end else row.text.push(token)
        reason = None
        if at_end or row.text.stopped:
            reason = "stop"
        elif row.count == params.max_tokens:
            reason = "length"
        if reason is not None:
            text += row.text.finish()
            if row.text.stopped:
                reason = "stop"
        if not text and reason is None:
            return False
        told = tuple(
            info for info, start in row.pending if row.text.cut is None or start < row.text.cut
        )
        row.pending.clear()
        update = Update(row.index, text, told, reason, row.count if reason else 0)  # type: ignore[arg-type]
        tell(row.generation, update)
        return reason is not None


def _most(generation: Generation) -> int:
    """The most tokens that a row of it may come to."""
    return len(generation.prompt) + generation.params.max_tokens


def failure(error: Exception) -> InferenceError:
    """An unforeseen error as whoever waits is told of it."""
    if isinstance(error, InferenceError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return InferenceError(
            "The device has no memory left for this request; try again, or ask for fewer tokens.",
            status=503,
            type="ServiceUnavailableError",
            retry_after=5,
        )
    return InferenceError(
        f"The inference process failed on this request: {error}",
        status=500,
        type="InternalServerError",
    )


def _not_a_number() -> InferenceError:
    return InferenceError(
        "The model's output is not a number: this adapter's weights lead out of the range of its "
        "dtype.",
        status=500,
        type="InternalServerError",
    )
