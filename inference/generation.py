"""Text from a model: one prompt in, n completions out.

The one place that samples tokens. It stands on transformers' `generate`, which runs one request at
a time; nothing outside this page knows that.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from bridge_engine.errors import EngineError
from bridge_engine.template import end_tokens


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. `temperature` 0 is greedy; `seed` None draws a new one."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One continuation. `tokens` counts what was generated, the end-of-text token included."""

    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]


class _StopStrings(StoppingCriteria):  # type: ignore[misc]  # untyped library
    """Ends a row once its text holds a stop string, and remembers at which length it did."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt_length: int, rows: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.prompt_length = prompt_length
        self.ended_at: list[int | None] = [None] * rows
        # No token writes less than one byte, so a stop string is never spread over more tokens than
        # it has bytes; a few more let the decoder join bytes into characters.
        self.window = max(len(text.encode()) for text in stop) + 8

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        length = input_ids.shape[1] - self.prompt_length
        start = max(self.prompt_length, input_ids.shape[1] - self.window)
        for row, ended in enumerate(self.ended_at):
            if ended is None:
                tail = self.tokenizer.decode(input_ids[row, start:], skip_special_tokens=True)
                if any(text in tail for text in self.stop):
                    self.ended_at[row] = length
        done = [ended is not None for ended in self.ended_at]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, prompt_ids: Sequence[int], params: SamplingParams
) -> list[Completion]:
    """`params.n` completions of the prompt by `model` as it stands (adapter chosen by the caller).

    The caller's global random state is left as it was: a seed gives the same text whatever else the
    process has sampled.
    """
    input_ids = torch.tensor([list(prompt_ids)], device=model.device)
    sampled = params.temperature > 0
    rows = params.n if sampled else 1  # greedy decoding has one answer; it is repeated below
    end_ids = _end_tokens(model, tokenizer)
    criteria = _StopStrings(tokenizer, params.stop, len(prompt_ids), rows) if params.stop else None
    config = GenerationConfig(
        max_new_tokens=params.max_tokens,
        do_sample=sampled,
        # Every setting is named, because those left out are taken from the model's own folder.
        temperature=params.temperature if sampled else 1.0,
        top_p=params.top_p if sampled else 1.0,
        top_k=0 if sampled else 50,
        repetition_penalty=1.0,
        num_beams=1,
        num_return_sequences=rows,
        eos_token_id=end_ids or None,
        pad_token_id=_pad_token(tokenizer, end_ids),
        use_cache=True,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(secrets.randbits(63) if params.seed is None else params.seed)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([criteria] if criteria else []),
        )
    completions = []
    for row, ids in enumerate(output[:, len(prompt_ids) :].tolist()):
        ended_at = criteria.ended_at[row] if criteria else None
        completions.append(_completion(tokenizer, ids, end_ids, ended_at, params.stop))
    return completions * params.n if not sampled else completions


def _completion(
    tokenizer: Any, ids: list[int], end_ids: list[int], ended_at: int | None, stop: Sequence[str]
) -> Completion:
    """Cuts padding, the end-of-text token and the stop string off a row."""
    end = next((i + 1 for i, token in enumerate(ids) if token in end_ids), None)
    length = min(value for value in (len(ids), end, ended_at) if value is not None)
    text = tokenizer.decode(ids[:length], skip_special_tokens=True)
    if ended_at is not None:
        text = text[: min((i for s in stop if (i := text.find(s)) >= 0), default=len(text))]
    finished = end is not None or ended_at is not None
    return Completion(text, length, "stop" if finished else "length")


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text: those at which training sampled until. None known: it runs on."""
    try:
        return end_tokens(model, tokenizer)
    except EngineError:
        return []


def _pad_token(tokenizer: Any, end_ids: list[int]) -> int:
    """What fills rows that have ended; cut off again, so any id will do."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return end_ids[0] if end_ids else 0
