"""Request and response bodies, as vLLM's OpenAI server has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class LoadAdapter(BaseModel):
    """POST /v1/load_lora_adapter. `base_model` is needed where the folder does not name it."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200)]
    lora_path: Annotated[str, Field(min_length=1)]
    base_model: str | None = None


class UnloadAdapter(BaseModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


class Sampling(BaseModel):
    """What both kinds of completion share. Fields of OpenAI's that are not here are refused rather
    than ignored: an answer that looks right and is not would be worse."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Default: 256, or what the context leaves."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    n: Annotated[int, Field(ge=1, le=64)] = 1
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    stream: Literal[False] = False
    user: str | None = None

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple; empty ones stop nothing."""
        found = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in found if text)


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: str


class Message(BaseModel):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]


Json = dict[str, Any]
