"""Bodies of /v1, as OpenAI's API has them.

What OpenAI has and this service does not is refused, unless it asks for nothing: an answer that
looks right and is not would be worse. What only concerns OpenAI's own bookkeeping is left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.generate.forms import Prompt, Seed, Stop, forms, some

_BOOKKEEPING = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "parallel_tool_calls",
}  # fmt: skip
_NOTHING: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}


class StreamOptions(BaseModel):
    """What a stream says beside text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Request(BaseModel):
    """What both kinds share."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """An adapter (JOB@STEP, JOB@best, JOB@latest, JOB, an alias) or a base model."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Default: 256, or what the model's context leaves."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Default 1; 0 always takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    stop: Stop | None = None
    seed: Seed | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            key: value
            for key, value in values.items()
            if key not in _BOOKKEEPING
            and value is not None
            and not (key in _NOTHING and value in _NOTHING[key])
        }

    @property
    def with_usage(self) -> bool:
        """Shall a stream end with the count of tokens?"""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> dict[str, Any]:
        """How to draw, for the backend."""
        names = {"max_tokens", "temperature", "top_p", "n", "stop", "seed"}
        return self.model_dump(include=names, exclude_none=True)


class CompletionRequest(Request):
    """POST /v1/completions: the prompt is continued as it is, without any template."""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Part(BaseModel):
    """Text within a message."""

    type: Literal["text"]
    text: str


Content = Annotated[
    str | list[Part],
    forms('a text, or a list of {"type": "text", "text": …}; Bridge reads only text'),
]


class ChatMessage(BaseModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text alone; a developer is the system's newer name."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {"role": self.role.replace("developer", "system"), "content": content or ""}


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1), some("message")]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def sampling(self) -> dict[str, Any]:
        """How to draw, for the backend."""
        found = super().sampling()
        if self.max_completion_tokens is not None:
            found["max_tokens"] = self.max_completion_tokens
        return found


class Model(BaseModel):
    """A base model or an adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "bridge"
    parent: str | None = None
    """Of an adapter: its base model."""
    root: str | None = None
    """Of an alias: the adapter it stands for."""


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]
