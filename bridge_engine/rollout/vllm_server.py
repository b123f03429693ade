"""A vLLM server as the sampler needs it: a few HTTP calls, and errors that say what to do.

Spoken to over HTTP and nothing else, so that vLLM lives in an environment of its own, with the
versions of torch and FastAPI it wants. The calls and their fields are those of vLLM 0.32.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from torch import Tensor

from bridge_engine.errors import EngineError
from bridge_engine.rollout.native import Completion, SamplingParams

ATTEMPTS = 4
"""Times a request is sent before a broken connection is an error."""
PAUSE_S = 0.25
"""Before the second attempt; doubles from one to the next."""
KEEPALIVE_S = 3.0
"""A connection idle for longer is opened anew: the server's own limit is 5 seconds."""
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as --max-lora-rank."""


@dataclass(frozen=True)
class ServedModel:
    """The base model of a server, as /v1/models has it."""

    name: str
    context: int
    """Longest sequence, prompt and completion, in tokens (--max-model-len)."""


class VllmServer:
    """One server. Thread-safe. Every trouble is an EngineError."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 600.0,
        api_key: str | None = None,
        connections: int = 64,
        field: str = "rollout.engine",
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`timeout_s`: longest wait for one answer; `field` of the spec asked for a server, and
        errors name it; `transport` stands between, in tests."""
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.field = field
        self.client = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=httpx.Limits(max_connections=connections, keepalive_expiry=KEEPALIVE_S),
            transport=transport,
        )

    def close(self) -> None:
        """Closes the connections."""
        self.client.close()

    # ------------------------------------------------------------------ what it serves

    def base(self) -> ServedModel:
        """The base model it was started with."""
        cards = self._json(self._answer("GET", "/v1/models"), "data")
        for card in cards:
            if card.get("parent") is None:
                return ServedModel(card["id"], int(card["max_model_len"]))
        raise self._error("it serves no base model", "vllm_refused")

    def version(self) -> str:
        """Of vLLM; `unknown` where what is in front of it does not tell."""
        response = self._answer("GET", "/version")
        try:
            return str(response.json()["version"]) if response.is_success else "unknown"
        except (ValueError, KeyError, TypeError):
            return "unknown"

    def load(self, name: str, folder: str, rank: int) -> None:
        """Makes the adapter in `folder`, a path on the server's machine, answer to `name`."""
        response = self._answer(
            "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}
        )
        if response.is_success:
            return
        said = _said(response)
        if "max_lora_rank" in said:
            fits = next((r for r in MAX_LORA_RANKS if r >= rank), None)
            raise self._error(
                f"its --max-lora-rank is too small for the policy's adapter, which has rank {rank} "
                f"(that of every parameter set together): {said}; "
                + (f"start it with --max-lora-rank {fits}" if fits else "lower lora.rank"),
                "vllm_lora_rank",
                param="lora.rank",
            )
        if response.status_code == 404 and "adapter" not in said.lower():
            raise self._error(
                "it loads no adapters at run time; start it with --enable-lora and, in its "
                "environment, VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or ask for merged weights "
                "with BRIDGE_VLLM_WEIGHTS=merged",
                "vllm_no_adapters",
            )
        if response.status_code == 404:
            raise self._error(
                f"it does not find the adapter that was written to {folder} ({said}); set "
                "BRIDGE_VLLM_SHARED to a folder that is the same path on both machines",
                "vllm_folder_not_shared",
            )
        raise self._refusal(response, "loading an adapter")

    def unload(self, name: str) -> None:
        """Takes an adapter away; one that is not there is well."""
        response = self._answer("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if not response.is_success and response.status_code != 404:
            raise self._refusal(response, "unloading an adapter")

    def reload(self, folder: str) -> None:
        """Replaces all weights by those of a folder on the server's machine, and forgets every
        key and value computed from the old ones."""
        response = self._answer(
            "POST",
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": folder}},
        )
        if response.status_code == 404:
            raise self._error(
                "it takes no new weights; start it with VLLM_SERVER_DEV_MODE=1 in its environment",
                "vllm_no_reload",
            )
        if not response.is_success:
            raise self._refusal(response, f"reloading its weights from {folder}")
        for pause in range(ATTEMPTS):
            if self._json(self._answer("POST", "/reset_prefix_cache"), "success"):
                return
            time.sleep(PAUSE_S * 2**pause)  # blocks are held by a request that is being dropped
        raise self._error(
            "its prefix cache cannot be reset: somebody else is sampling from it; merged weights "
            "need a server of their own",
            "vllm_busy",
            retryable=True,
        )

    # ------------------------------------------------------------------ asking it

    def complete(
        self,
        model: str,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        eos_ids: Sequence[int],
        seed: int | None = None,
    ) -> Completion:
        """One completion of a prompt, all of it token ids; it ends at `eos_ids` and nowhere else.

        Every knob is set here, for the server's defaults come from the model's generation config.
        """
        choice = self._choice(
            {
                "model": model,
                "prompt": list(prompt),
                "max_tokens": params.max_new_tokens,
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": 0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "seed": seed,
                "ignore_eos": True,
                "stop_token_ids": list(eos_ids),
                "logprobs": 0,
                "return_token_ids": True,
            }
        )
        tokens: list[int] = choice["token_ids"]
        logprobs: list[float] = choice["logprobs"]["token_logprobs"]
        finished = bool(tokens) and tokens[-1] in eos_ids
        if len(tokens) != len(logprobs) or (not finished and len(tokens) < params.max_new_tokens):
            raise self._error(
                f"it broke off a completion after {len(tokens)} tokens "
                f"(finish_reason {choice['finish_reason']!r})",
                "vllm_failed",
                retryable=True,
            )
        return Completion(tokens, logprobs, finished)

    def score(self, model: str, tokens: Sequence[int]) -> Tensor:
        """logprobs_L of each token but the first given those before it, computed afresh: a request
        for these does not read the prefix cache."""
        choice = self._choice(
            {
                "model": model,
                "prompt": list(tokens),
                "max_tokens": 1,
                "temperature": 0.0,
                "prompt_logprobs": 0,
            }
        )
        found = zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True)
        return torch.tensor([position[str(token)]["logprob"] for token, position in found])

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        response = self._answer("POST", "/v1/completions", body)
        choice: dict[str, Any] = self._json(response, "choices")[0]
        return choice

    # ------------------------------------------------------------------ HTTP

    def _answer(self, verb: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        """The response, whatever its status. A broken connection is tried again: a request that
        did arrive asks for the same draws, and a second loading of a name is refused."""
        for attempt in range(ATTEMPTS):
            try:
                return self.client.request(verb, path, json=body)
            except httpx.ConnectTimeout as error:
                raise self._unreachable(error) from error
            except httpx.TimeoutException as error:
                raise EngineError(
                    f"the vLLM server at {self.url} gave no answer to {path} within "
                    f"{self.timeout_s:g} s; look at its log, or raise BRIDGE_VLLM_TIMEOUT",
                    code="vllm_timeout",
                    category="timeout",
                    retryable=True,
                ) from error
            except (httpx.TransportError, httpx.InvalidURL) as error:
                if attempt + 1 == ATTEMPTS or isinstance(error, httpx.UnsupportedProtocol):
                    raise self._unreachable(error) from error
                time.sleep(PAUSE_S * 2**attempt)
        raise AssertionError("the last attempt answers or raises")

    def _json(self, response: httpx.Response, key: str) -> Any:
        """A field of a good answer."""
        if not response.is_success:
            raise self._refusal(response, response.request.url.path)
        try:
            return response.json()[key]
        except (ValueError, KeyError, TypeError):
            raise self._error(
                f"its answer to {response.request.url.path} is none of vLLM's: "
                f"{response.text[:200]!r}; is BRIDGE_VLLM_URL the address of a vLLM server?",
                "vllm_refused",
            ) from None

    def _unreachable(self, error: Exception) -> EngineError:
        return EngineError(
            f"the vLLM server at {self.url} cannot be reached ({type(error).__name__}: {error}); "
            "start it, or correct BRIDGE_VLLM_URL",
            code="vllm_unreachable",
            category="infra",
            param=self.field,
            retryable=True,
        )

    def _refusal(self, response: httpx.Response, what: str) -> EngineError:
        ours = response.status_code < 500
        return self._error(
            f"it answered {what} with {response.status_code}: {_said(response)}",
            "vllm_refused" if ours else "vllm_failed",
            retryable=not ours,
        )

    def _error(
        self, message: str, code: str, *, param: str | None = None, retryable: bool = False
    ) -> EngineError:
        return EngineError(
            f"the vLLM server at {self.url}: {message}",
            code=code,
            category="infra",
            param=param,
            retryable=retryable,
        )


def _said(response: httpx.Response) -> str:
    """What an error's body says, in OpenAI's form or in FastAPI's, else as it is."""
    try:
        body = response.json()
        return str(body["error"]["message"] if "error" in body else body["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500]
