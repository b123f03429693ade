"""Request bodies, as vLLM's OpenAI server has them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
MOST_CHOICES = 64


class LoadAdapter(BaseModel):
    """POST /v1/load_lora_adapter. `base_model` is needed where the folder does not name it;
    weights that are not those of `sha256` are refused. A `pinned` one never makes room for others,
    nor does its base model."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1)]
    base_model: str | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    pinned: bool = False


class LoadModel(BaseModel):
    """POST /v1/load_model, a route of our own: a whole model that was trained, under a name that
    has a colon, which no base model's has. A `pinned` one never makes room for others."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=":")]
    path: Annotated[str, Field(min_length=1)]
    pinned: bool = False


class UnloadAdapter(BaseModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


class StreamOptions(BaseModel):
    """What a stream says beside text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Sampling(BaseModel):
    """What both kinds of completion share. Fields of OpenAI's that are not here are refused rather
    than ignored: an answer that looks right and is not would be worse."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Default: 256, or what the context leaves."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple; empty ones stop nothing."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in found if text)

    @property
    def usage_wanted(self) -> bool:
        """Shall a stream end with the count of tokens?"""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(Sampling):
    """POST /v1/completions. Several prompts get `n` choices each, in their order."""

    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_CHOICES)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Log-probabilities of the tokens, and of this many of the likeliest at each place."""
    echo: bool = False
    """Give the prompt back too, with its log-probabilities where those are asked for."""

    def prompts(self) -> list[str] | list[list[int]]:
        """Every prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class Message(BaseModel):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of `max_tokens`; wins where both are given."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
