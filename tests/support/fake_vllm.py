"""A fake of vLLM's HTTP surface, for what is ours in front of it: which adapters are loaded, what
is asked, what becomes of its errors. Routes, statuses and messages are those of vLLM 0.32, which
`tests/vllm/test_serving.py` runs for real. It has no model: an adapter "answers" with the digest of
the weights that its name was first loaded with, for ever, as a prefix cache would have it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

PATHS = (
    "/load", "/version", "/kv_event_sources", "/health", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/tokenize", "/detokenize", "/v1/systemone", "/ping", "/invocations",
    "/v1/chat/completions/batch", "/v1/responses", "/v1/responses/x", "/v1/responses/x/cancel",
    "/v1/messages", "/v1/messages/count_tokens", "/generative_scoring", "/scale_elastic_ep",
    "/is_scaling_elastic_ep", "/pause", "/resume", "/is_paused", "/sleep", "/wake_up",
    "/is_sleeping", "/update_weights", "/init_weight_transfer_engine", "/collective_rpc",
    "/reset_prefix_cache", "/reset_mm_cache", "/server_info", "/start_profile", "/stop_profile",
    "/v1/embeddings", "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank",
    "/v1/audio/transcriptions", "/inference/v1/generate",
)  # fmt: skip
"""Of a server with every mode on; those that are ours too (/v1/models, …) left out."""
CANARY = {"tokens": [1, 2, 3], "dtype": "float32"}


def logprobs_of(digest: str) -> list[float]:
    """What the canary of these weights comes to."""
    return [-1 - int(digest[i : i + 2], 16) / 64 for i in (0, 2)]


class FakeVllm:
    """One server. `app` is served on a real socket, for streams and hang-ups."""

    def __init__(self, *names: str, key: str = "", max_lora_rank: int = 16) -> None:
        self.names, self.key, self.max_lora_rank = names, key, max_lora_rank
        self.adapters: dict[str, str] = {}
        """Paths by name."""
        self.first: dict[str, str] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        """Path and body of every request that was let in."""
        self.peers: set[tuple[str, int]] = set()
        """Where the connections came from."""
        self.root = "/models/base"
        """Where its base model lies."""
        self.refusal: tuple[int, Any] | None = None
        """Answers every completion; a text as it is."""
        self.canary_refusal: tuple[int, Any] | None = None
        """Answers those that are asked for the prompt's log-probabilities."""
        self.canary_waits: threading.Event | None = None
        """They wait for it."""
        self.unload_refusal: tuple[int, Any] | None = None
        self.hangs: threading.Event | None = None
        """Nothing is answered until then."""
        self.says: str | None = None
        """Written instead of a digest."""
        self.is_mistral = False
        """Has Mistral's own tokenizer."""
        self.go_on: threading.Event | None = None
        """A stream waits for it behind its first chunk."""
        self.break_off = False
        self.gone = 0
        """Streams whose client hung up."""
        self.app = FastAPI()
        self.app.add_api_route(
            "/{path:path}", self._answer, methods=["GET", "POST", "PUT", "DELETE"]
        )

    def restart(self) -> None:
        """Forgets every adapter."""
        self.adapters.clear()

    async def _answer(self, path: str, request: Request) -> Response:
        body = json.loads(await request.body() or b"{}")
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        self.asked.append((f"/{path}", body))
        self.peers.add(request.client or ("", 0))
        await _until(self.hangs)
        match path:
            case "health":
                return Response()
            case "v1/models":
                return JSONResponse({"object": "list", "data": self._cards()})
            case "v1/load_lora_adapter":
                return self._load(body)
            case "v1/unload_lora_adapter":
                if self.unload_refusal is not None:
                    return _said(self.unload_refusal)
                if self.adapters.pop(body["lora_name"], None) is None:
                    said = f"The lora adapter '{body['lora_name']}' cannot be found."
                    return _error(404, said)
                return PlainTextResponse("Success")
            case "v1/completions" | "v1/chat/completions":
                return await self._complete(body)
        return JSONResponse({"reached": path})  # whatever else vLLM would do

    def _cards(self) -> list[dict[str, Any]]:
        own = [{"id": name, "parent": None, "root": self.root} for name in self.names]
        return [
            *own,
            *({"id": n, "parent": self.names[0], "root": p} for n, p in self.adapters.items()),
        ]

    def _load(self, body: dict[str, Any]) -> Response:
        name, folder = body["lora_name"], Path(body["lora_path"])
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded. If you want …")
        if not (folder / "adapter_config.json").is_file():
            return _error(404, f"Loading lora {name} failed: No adapter found for {folder}")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.max_lora_rank:
            said = f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
            return _error(500, f"Call to add_lora method failed: Worker failed with error '{said}'")
        digest = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        self.adapters[name] = str(folder)
        self.first.setdefault(name, digest)
        return PlainTextResponse("Success")

    async def _complete(self, body: dict[str, Any]) -> Response:
        name, n = body["model"], body.get("n") or 1
        if body.get("echo"):
            await _until(self.canary_waits)
            if self.canary_refusal is not None:
                return _said(self.canary_refusal)
        if self.refusal is not None:
            return _said(self.refusal)
        if name not in self.adapters and name not in self.names:
            return _error(404, f"The model `{name}` does not exist.")
        if body["temperature"] == 0 and n > 1:
            return _error(400, f"n must be 1 when using greedy sampling, got {n}.")
        if self.is_mistral and "chat_template_kwargs" in body:
            return _error(400, "chat_template is not supported for Mistral tokenizers.")
        text = self.says or self.first.get(name, name)
        usage = {"prompt_tokens": 3, "completion_tokens": n, "total_tokens": 3 + n}
        if body.get("stream"):
            counted = usage if body.get("stream_options") else None
            return StreamingResponse(
                self._stream(text, n, counted), media_type="text/event-stream; charset=utf-8"
            )
        choice: dict[str, Any] = {"text": text, "logprobs": None, "finish_reason": "stop"}
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": choice.pop("text")}
        if body.get("echo"):
            found = [None, *logprobs_of(text), -1.0]
            choice["logprobs"] = {"tokens": list("abcd"), "token_logprobs": found}
        choices = [{**choice, "index": index} for index in range(n)]
        return JSONResponse({"choices": choices, "usage": usage})

    async def _stream(self, text: str, n: int, usage: dict[str, int] | None) -> AsyncIterator[str]:
        try:
            for place, piece in enumerate((text[:4], text[4:8], text[8:])):
                if place:
                    await _until(self.go_on)
                if place and self.break_off:
                    raise ConnectionError("the process died")
                for index in range(n):
                    yield _event([{"index": index, "text": piece, "finish_reason": None}])
            for index in range(n):
                yield _event([{"index": index, "text": "", "finish_reason": "stop"}])
            if usage:
                yield _event([], usage=usage)
            yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone += 1
            raise


async def _until(event: threading.Event | None) -> None:
    while event is not None and not event.is_set():
        await asyncio.sleep(0.01)


def _event(choices: list[dict[str, Any]], **more: Any) -> str:
    return f"data: {json.dumps({'choices': choices, **more}, ensure_ascii=False)}\n\n"


def _said(refusal: tuple[int, Any]) -> Response:
    status, body = refusal
    return Response(body, status) if isinstance(body, str) else JSONResponse(body, status)


def _error(status: int, message: str) -> JSONResponse:
    error = {"message": message, "type": "NotFoundError", "param": None, "code": status}
    return JSONResponse({"error": error}, status)
