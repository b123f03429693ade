"""Bodies of POST /generate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from service.generate.forms import Seed, Stop, some


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class GenerateRequest(BaseModel):
    """What to continue, by which model, how."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    adapter: str | None = None
    """A trained adapter: JOB@STEP, JOB@best, JOB@latest or JOB (the best, else the newest)."""
    model: str | None = None
    """A base model, which answers without any adapter; or an adapter, named as in `adapter`."""
    prompt: str | None = None
    """The problem. It is put into the template the adapter was trained with, unless `raw`."""
    messages: Annotated[list[Message], Field(min_length=1), some("message")] | None = None
    """A conversation instead of a prompt, for models with a chat template."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longest completion; default: 256, or what the model's context leaves."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """0 always takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    n: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of completions."""
    stop: Stop | None = None
    """Texts that end a completion; they are not part of it."""
    seed: Seed | None = None
    """The same seed gives the same completions."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Log-probabilities of the tokens, and of this many of the likeliest at each place."""
    stream: bool = False
    """Send the text as it is written, as server-sent events."""
    raw: bool = False
    """Continue the prompt exactly as it is, without the template."""

    @model_validator(mode="after")
    def _possible(self) -> GenerateRequest:
        if self.adapter is None and self.model is None:
            raise _impossible("adapter", "name an adapter, or a base model")
        if self.prompt is None and self.messages is None:
            raise _impossible("prompt", "give a prompt, or messages")
        if self.prompt is not None and self.messages is not None:
            raise _impossible("messages", "give a prompt or messages, not both")
        if self.raw and self.messages is not None:
            raise _impossible("raw", "raw is about prompts; messages always need a template")
        return self


def _impossible(param: str, message: str) -> PydanticCustomError:
    context = {"message": message, "param": param}
    return PydanticCustomError("impossible_combination", "{message}", context)


class Likely(BaseModel):
    """A token that was likely."""

    token: str
    logprob: float | None
    bytes: list[int] | None = None


class TokenLogprob(Likely):
    """A token of the text, and the likeliest in its place."""

    top_logprobs: list[Likely] = []


class Choice(BaseModel):
    """One completion."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    """`stop`: it ended by itself or at a stop text; `length`: it was cut at max_tokens."""
    logprobs: list[TokenLogprob] | None = None
    """Where they were asked for: the tokens of the text in order."""


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Generation(BaseModel):
    """What a model wrote."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    object: Literal["generation"] = "generation"
    adapter: str | None
    """The adapter's immutable name, whatever name was asked for; null for a bare base model."""
    model: str
    """The base model."""
    choices: list[Choice]
    usage: Usage


EXAMPLES = {
    "adapter": {
        "summary": "The best adapter of a job",
        "value": {"adapter": "job_01k0example@best", "prompt": "12+3-5?"},
    },
    "sampling": {
        "summary": "Four samples, the same each time",
        "value": {
            "adapter": "job_01k0example",
            "prompt": "12+3-5?",
            "temperature": 1.0,
            "n": 4,
            "seed": 7,
            "max_tokens": 64,
        },
    },
    "stream": {
        "summary": "As it is written",
        "value": {"adapter": "job_01k0example", "prompt": "12+3-5?", "stream": True},
    },
    "base": {
        "summary": "The bare base model",
        "value": {"model": "bridge-tiny", "prompt": "12+3-5?"},
    },
}
