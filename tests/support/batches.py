"""A batch of the inference process without its thread: advanced by hand, told of at once."""

from __future__ import annotations

import asyncio

from inference.batch import Batch
from inference.errors import InferenceError
from inference.lora import LoraWeights
from inference.requests import Completion, Generation, Update, collected
from inference.sampling import SamplingParams


def written_by(
    batch: Batch, prompt: list[int], params: SamplingParams, lora: LoraWeights | None = None
) -> list[Completion]:
    """The finished choices of one request that has the batch to itself."""
    return written_together(batch, [(prompt, params, lora)])[0]


def written_together(
    batch: Batch, requests: list[tuple[list[int], SamplingParams, LoraWeights | None]]
) -> list[list[Completion]]:
    """The finished choices of requests that come at the same time."""

    async def run() -> list[list[Completion]]:
        made = [Generation(batch, lora, prompt, params) for prompt, params, lora in requests]
        batch.waiting.extend(made)

        def tell(generation: Generation, news: Update | InferenceError) -> None:
            generation.report([news])

        while not batch.idle:
            batch.advance(tell)
        return [await collected(generation) for generation in made]

    return asyncio.run(run())
