"""From a request's body to its answer: prompts, lengths, the line, the text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from bridge_engine.data.template import render_chat
from bridge_http.requests import tell_trouble
from inference.errors import InferenceError
from inference.registry import Adapter, Base, Registry
from inference.requests import Completion, Generation, Update, collected
from inference.responses import Shape, pieces, usage_of
from inference.sampling import SamplingParams
from inference.scheduler import Scheduler
from inference.schemas import ChatRequest, CompletionRequest, Sampling

DEFAULT_MAX_TOKENS = 256


def text_prompts(base: Base, body: CompletionRequest) -> list[list[int]]:
    """The prompts of /v1/completions as token ids."""
    size = base.model.config.get_text_config().vocab_size
    found = []
    for prompt in body.prompts():
        ids = base.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        if not ids:
            raise InferenceError(
                "The prompt is empty: there is nothing to continue.", param="prompt"
            )
        if max(ids) >= size:
            raise InferenceError(
                f"The token id {max(ids)} is outside the vocabulary of {size}.", param="prompt"
            )
        found.append(list(ids))
    return found


def chat_prompt(base: Base, body: ChatRequest) -> list[int]:
    """The conversation as token ids, up to where the answer begins."""
    if base.tokenizer.chat_template is None:
        raise InferenceError(
            f"The base model {base.name!r} has no chat template and takes no conversations: "
            "give it a prompt instead.",
            param="messages",
        )
    try:
        text = render_chat([message.model_dump() for message in body.messages], base.tokenizer)
    except Exception as error:  # what a template makes of turns it does not expect
        raise InferenceError(
            f"The chat template of {base.name!r} does not take these messages: {error}",
            param="messages",
        ) from error
    ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _room(base: Base, prompt: list[int], body: Sampling, param: str) -> int:
    """The most tokens of an answer; InferenceError where they do not fit into the context."""
    context = base.context
    if len(prompt) >= context:
        raise InferenceError(
            f"The prompt has {len(prompt)} tokens; the context of {base.name!r} is {context} "
            "tokens and must hold at least one more. Shorten the prompt.",
            param=param,
        )
    room = context - len(prompt)
    if body.max_tokens is not None and body.max_tokens > room:
        raise InferenceError(
            f"{len(prompt)} prompt tokens and max_tokens {body.max_tokens} are {len(prompt)} + "
            f"{body.max_tokens} = {len(prompt) + body.max_tokens} tokens; the context of "
            f"{base.name!r} is {context}. Ask for at most {room}.",
            param="max_tokens",
        )
    return body.max_tokens or min(DEFAULT_MAX_TOKENS, room)


async def answer(
    registry: Registry,
    scheduler: Scheduler,
    request: Request,
    body: CompletionRequest | ChatRequest,
    prompts_of: Callable[[Base], list[list[int]]],
    params: Callable[[int], SamplingParams],
) -> Response:
    """Generates, and answers in one piece or as a stream. Who hangs up is not written for."""
    target = await registry.find(body.model)
    chat = isinstance(body, ChatRequest)
    with ExitStack() as stack:
        base = stack.enter_context(registry.pinned(target))
        lora = target.weights if isinstance(target, Adapter) else None
        generations = []
        for prompt in prompts_of(base):
            most = _room(base, prompt, body, "messages" if chat else "prompt")
            generations.append(
                Generation(base.batch, lora, prompt, params(most), stream=body.stream)
            )
        scheduler.submit(*generations)
        stack.callback(scheduler.cancel, *generations)
        shape = Shape(body.model, base.tokenizer, chat=chat)
        if body.stream:
            events = pieces(
                *(shape, generations, _merged(generations)),
                logprobs=generations[0].params.logprobs is not None,
                usage=body.usage_wanted,
                broken=lambda error: tell_trouble(
                    request.scope, error.status, error.type, error.message
                ),
            )
            return _Stream(events, stack.pop_all())
        done = await _unless_hung_up(request, _all(generations))
        return JSONResponse(_whole(shape, generations, done))


async def _all(generations: Sequence[Generation]) -> list[list[Completion]]:
    return list(await asyncio.gather(*(collected(g) for g in generations)))


def _whole(
    shape: Shape, generations: Sequence[Generation], done: list[list[Completion]]
) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    counted = 0
    for generation, completions in zip(generations, done, strict=True):
        for completion in completions:
            counted += completion.count
            told = list(completion.tokens)
            if generation.params.echo:
                told = generation.prompt_logprobs + told
                completion.text = "".join(map(shape.token, generation.prompt)) + completion.text
            wanted = told if generation.params.logprobs is not None else None
            choices.append(shape.choice(len(choices), completion, wanted))
    return shape.whole(choices, usage_of(generations, counted))


async def _merged(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Update]]:
    """News of all prompts as they come, each with the number of its prompt."""
    if len(generations) == 1:
        async for update in generations[0].updates():
            yield 0, update
        return
    found: asyncio.Queue[tuple[int, Update] | BaseException | None] = asyncio.Queue()

    async def follow(number: int) -> None:
        try:
            async for update in generations[number].updates():
                found.put_nowait((number, update))
            found.put_nowait(None)
        except InferenceError as error:
            found.put_nowait(error)

    tasks = [asyncio.create_task(follow(number)) for number in range(len(generations))]
    try:
        left = len(tasks)
        while left:
            item = await found.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()


class _Stream(StreamingResponse):
    """Server-sent events. However it ends, what it held is let go of."""

    def __init__(self, events: AsyncIterator[str], held: ExitStack) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_UNBUFFERED)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._held:
            await super().__call__(scope, receive, send)


_UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


async def _unless_hung_up(request: Request, work: Any) -> Any:
    """The result of `work`; it is given up when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise InferenceError("The client hung up.", status=499, type="ClientClosedRequest")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
