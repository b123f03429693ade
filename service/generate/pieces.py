"""What a model wrote, in one form between the backend's shapes and ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Entry = dict[str, Any]
"""{token, logprob, bytes, top_logprobs: [{token, logprob, bytes}]}, as OpenAI's chats have it."""


@dataclass(frozen=True)
class Piece:
    """Text of one choice, the whole of it or what came just now."""

    index: int
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[Entry] = field(default_factory=list)


def read(choice: Mapping[str, Any]) -> Piece:
    """A choice of /v1/completions or /v1/chat/completions, streamed or not."""
    message = choice.get("message") or choice.get("delta") or {}
    text = choice.get("text") if "text" in choice else message.get("content")
    return Piece(
        choice["index"], text or "", choice.get("finish_reason"), _entries(choice.get("logprobs"))
    )


def _entries(logprobs: Mapping[str, Any] | None) -> list[Entry]:
    if not logprobs:
        return []
    if "content" in logprobs:
        return list(logprobs["content"] or [])
    tokens = logprobs.get("tokens") or []
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    values = logprobs.get("token_logprobs") or [None] * len(tokens)
    return [
        {
            **_entry(token, value),
            "top_logprobs": [_entry(other, v) for other, v in (top or {}).items()],
        }
        for token, value, top in zip(tokens, values, tops, strict=True)
    ]


def _entry(token: str, logprob: float | None) -> Entry:
    told = None if "\N{REPLACEMENT CHARACTER}" in token else list(token.encode())
    return {"token": token, "logprob": logprob, "bytes": told}


def chat_choice(piece: Piece, *, streamed: bool, logprobs: bool) -> dict[str, Any]:
    """A choice of a chat completion, or of a chunk of one."""
    told = {"content": piece.logprobs} if logprobs and (piece.logprobs or not streamed) else None
    if streamed:
        said: dict[str, Any] = {"delta": {"content": piece.text} if piece.text else {}}
    else:
        said = {"message": {"role": "assistant", "content": piece.text, "refusal": None}}
    return {
        "index": piece.index,
        **said,
        "logprobs": told,
        "finish_reason": piece.finish_reason,
    }


def text_choice(piece: Piece, *, logprobs: bool, start: int = 0) -> dict[str, Any]:
    """A choice of a text completion, or of a chunk of one, whose tokens begin at `start`."""
    return {
        "index": piece.index,
        "text": piece.text,
        "logprobs": _columns(piece.logprobs, start) if logprobs else None,
        "finish_reason": piece.finish_reason,
    }


def _columns(entries: Sequence[Entry], start: int) -> dict[str, Any]:
    offsets, place = [], start
    for entry in entries:
        offsets.append(place)
        place += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {top["token"]: top["logprob"] for top in entry.get("top_logprobs") or []}
            for entry in entries
        ],
        "text_offset": offsets,
    }
