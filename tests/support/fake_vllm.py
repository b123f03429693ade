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
        self.refusal: tuple[int, dict[str, Any]] | None = None
        """Answers every completion."""
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
        match path:
            case "health":
                return Response()
            case "v1/models":
                return JSONResponse({"object": "list", "data": self._cards()})
            case "v1/load_lora_adapter":
                return self._load(body)
            case "v1/unload_lora_adapter":
                if self.adapters.pop(body["lora_name"], None) is None:
                    said = f"The lora adapter '{body['lora_name']}' cannot be found."
                    return _error(404, said)
                return PlainTextResponse("Success")
            case "v1/completions" | "v1/chat/completions":
                return self._complete(body)
        return JSONResponse({"reached": path})  # whatever else vLLM would do

    def _cards(self) -> list[dict[str, Any]]:
        own = [{"id": name, "parent": None, "max_model_len": 256} for name in self.names]
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

    def _complete(self, body: dict[str, Any]) -> Response:
        if self.refusal is not None:
            return JSONResponse(self.refusal[1], self.refusal[0])
        name = body["model"]
        if name not in self.adapters and name not in self.names:
            return _error(404, f"The model `{name}` does not exist.")
        text = self.first.get(name, name)
        if body.get("stream"):
            return StreamingResponse(self._stream(text), media_type="text/event-stream")
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
        if body.get("echo"):
            found = [None, *logprobs_of(text), -1.0]
            choice["logprobs"] = {"tokens": list("abcd"), "token_logprobs": found}
        usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
        return JSONResponse({"choices": [choice], "usage": usage})

    async def _stream(self, text: str) -> AsyncIterator[str]:
        try:
            for place, piece in enumerate((text[:4], text[4:8], text[8:])):
                while place and self.go_on is not None and not self.go_on.is_set():
                    await asyncio.sleep(0.01)
                if place and self.break_off:
                    raise ConnectionError("the process died")
                choice = {"index": 0, "text": piece, "finish_reason": None}
                yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            end = {"index": 0, "text": "", "finish_reason": "stop"}
            yield f"data: {json.dumps({'choices': [end]})}\n\ndata: [DONE]\n\n"
        except asyncio.CancelledError:
            self.gone += 1
            raise


def _error(status: int, message: str) -> JSONResponse:
    error = {"message": message, "type": "NotFoundError", "param": None, "code": status}
    return JSONResponse({"error": error}, status)
