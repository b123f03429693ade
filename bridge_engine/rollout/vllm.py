"""Sampling from a vLLM server: the weights go through a folder both can read, the rest over HTTP.

`adapter` (the default): each sync writes the policy as one PEFT adapter and loads it under a name
that was never used before, for a name used twice serves what its prefix cache remembers. `merged`
(full students, and vLLM's CPU build, whose LoRA kernel is slow): each sync writes the whole weights
and makes the server reload them, which takes a server of one's own in development mode.

A base model alone, which no set is added to, is what an `adapter` server serves anyway: nothing is
brought. After each sync the server is probed, and what does not answer as the policy stops the run.
See docs/vllm.md for how to start the server.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

import torch

from bridge_engine.distributed.ranks import World
from bridge_engine.distributed.sharding import whole
from bridge_engine.errors import EngineError
from bridge_engine.export import AdapterCard, export_adapter, exported_rank
from bridge_engine.metrics import Metrics
from bridge_engine.models.loading import resolve_dtype
from bridge_engine.policy import Policy
from bridge_engine.rollout import probe
from bridge_engine.rollout.native import Completion, Draws, SamplingParams
from bridge_engine.rollout.sampler import SamplingJob
from bridge_engine.rollout.serving_weights import write_serving_weights
from bridge_engine.rollout.vllm_server import VllmServer

Mode = Literal["adapter", "merged"]
"""How weights reach the server."""
_WHOLE = (
    "; the whole model of a full student has to be brought to it: BRIDGE_VLLM_WEIGHTS=merged, and "
    "VLLM_SERVER_DEV_MODE=1 in the server's environment"
)
SEEDS = 2**62
"""Seeds of single rows are drawn below this."""


class VllmSampler:
    """The `Sampler` (see `rollout.sampler`) of a vLLM server."""

    def __init__(
        self,
        policy: Policy,
        names: Sequence[str],
        spec: SamplingJob,
        folder: Path,
        server: VllmServer,
        *,
        mode: Mode | None = None,
        world: World | None = None,
    ) -> None:
        """`folder`: where weights are put for the server, this run's alone. `mode` None: merged for
        a full student, else adapter.

        Raises EngineError where the server cannot be reached, serves another model, or computes in
        another dtype than the trainer.
        """
        self.policy = policy
        self.spec = spec
        self.policy_names = tuple(names)
        self.folder = folder
        self.server = server
        self.world = world or World()
        self.mode: Mode = mode or ("merged" if policy.full else "adapter")
        if self.mode == "adapter" and policy.full:
            raise EngineError(
                "a full student is no adapter; its weights reach a vLLM server merged: unset "
                "BRIDGE_VLLM_WEIGHTS, or set it to merged",
                code="vllm_no_adapters",
                param="student.form",
            )
        self.dtype = resolve_dtype(spec.runtime, policy.device)
        self.tolerance = probe.tolerance_of(self.dtype)
        self.token = uuid.uuid4().hex[:12]
        """Of this process: what an attempt before it called its adapters is never used again."""
        self.syncs = 0
        self.serving: str | None = None
        """Name of the weights that were brought; None: none yet, or the base's own are served."""
        self.base = self.world.first(server.base)
        self.model = self.base.name
        """What requests name."""
        context = min(self.base.context, policy.context)
        vocabulary = policy.model.get_input_embeddings().num_embeddings
        self.prompt = probe.probe_prompt(vocabulary, context)
        self.others = {"the base": self._ours(("student",) if policy.full else (), self.prompt)}
        """Log-probabilities of the probe under weights that the server may have kept."""
        self.world.first(self._begin)

    @classmethod
    def from_environment(
        cls,
        policy: Policy,
        names: Sequence[str],
        run_directory: Path,
        spec: SamplingJob,
        world: World | None = None,
    ) -> VllmSampler:
        """As the operator's environment says (docs/vllm.md): BRIDGE_VLLM_URL, and if need be
        BRIDGE_VLLM_SHARED, BRIDGE_VLLM_WEIGHTS, BRIDGE_VLLM_API_KEY, BRIDGE_VLLM_TIMEOUT."""
        url, field = os.environ.get("BRIDGE_VLLM_URL", ""), f"{spec.rollout_field}.engine"
        if not url:
            raise EngineError(
                f"{field} is vllm, and BRIDGE_VLLM_URL does not say where the server is; set it "
                f"where the engine (the worker) runs, or use {field}: native",
                code="vllm_not_configured",
                category="infra",
                param=field,
            )
        weights = os.environ.get("BRIDGE_VLLM_WEIGHTS") or None
        if weights is not None and weights not in get_args(Mode):
            raise _misconfigured("BRIDGE_VLLM_WEIGHTS", weights, "adapter or merged")
        timeout = os.environ.get("BRIDGE_VLLM_TIMEOUT") or "600"
        if not timeout.isdecimal() or timeout == "0":
            raise _misconfigured("BRIDGE_VLLM_TIMEOUT", timeout, "a whole number of seconds")
        if not _is_address(url):
            raise _misconfigured("BRIDGE_VLLM_URL", url, "an address, http://HOST:PORT")
        server = VllmServer(
            url,
            timeout_s=float(timeout),
            api_key=os.environ.get("BRIDGE_VLLM_API_KEY") or None,
            connections=spec.rollout.batch_size,
            field=field,
        )
        folder = shared_folder(run_directory, os.environ.get("BRIDGE_VLLM_SHARED") or None)
        mode: Mode | None = "merged" if weights == "merged" else "adapter" if weights else None
        return cls(policy, names, spec, folder, server, mode=mode, world=world)

    # ------------------------------------------------------------------ weights

    def sync(self, step: int, names: Sequence[str] | None = None) -> Metrics:
        """See `Sampler`. Answers `vllm/probe` (nats a token between server and trainer) and
        `time/sync` (seconds); EngineError `stale_weights` where the server did not follow."""
        began = time.monotonic()
        chosen = self.policy_names if names is None else tuple(names)
        with whole(self.policy, *chosen):
            self.model, distance = self.world.first(lambda: self._sync(step, chosen))
        return {"vllm/probe": distance, "time/sync": time.monotonic() - began}

    def _begin(self) -> None:
        """Takes away what an attempt that died has left, and compares the base models."""
        leftovers = sorted(self.folder.glob("bridge-*")) if self.folder.is_dir() else []
        for leftover in leftovers:
            if self.mode == "adapter":
                self.server.unload(leftover.name)
            shutil.rmtree(leftover, ignore_errors=True)
        if self.mode == "adapter":  # else the server may hold what an earlier run gave it
            scored_L = self.server.score(self.base.name, self.prompt)
            distance = probe.mean_distance(scored_L, self.others["the base"])
            if not distance <= self.tolerance.mean:
                raise EngineError(
                    f"the vLLM server at {self.server.url} serves {self.base.name!r}, which is not "
                    f"the model {self.spec.base!r} in {self._dtype}: its log-probabilities of a "
                    f"fixed sequence are {distance:.2g} nats a token away from the trainer's "
                    f"({self.tolerance.mean:g} are allowed); start it on the same model with "
                    f"--dtype {self._dtype}, or set runtime.dtype to the server's"
                    + ("" if self.policy_names else _WHOLE),
                    code="wrong_base_model",
                    category="infra",
                    param="model",
                )

    def _sync(self, step: int, names: tuple[str, ...]) -> tuple[str, float]:
        """Brings the weights over; (what requests must name, the probe's distance)."""
        self.syncs += 1
        name = f"bridge-{self.token}-step-{step:06d}-{self.syncs}"
        before, self.serving = self.serving, None
        model = self.base.name
        if names or self.mode == "merged":
            self._serve(name, step, names)
            self.serving = name
            model = name if self.mode == "adapter" else model
        if before is not None:
            self._withdraw(before)
        return model, self._probe(model, name, step, names)

    def _serve(self, name: str, step: int, names: tuple[str, ...]) -> None:
        place = self.folder / name
        if self.mode == "merged":
            write_serving_weights(self.policy, names, place, self.dtype)
            self.server.reload(str(place))
            return
        rank = exported_rank(self.policy.adapters, names)
        card = AdapterCard(
            base_model=self.base.name,
            method=self.spec.method_name,
            step=step,
            rank=rank,
            template={},  # prompts go there as tokens
            max_new_tokens=0,
        )
        export_adapter(self.policy.adapters, names, place, card)
        self.server.load(name, str(place), rank)

    def _withdraw(self, name: str) -> None:
        """The server may read an adapter's files again for as long as it serves it."""
        if self.mode == "adapter":
            self.server.unload(name)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _probe(self, model: str, name: str, step: int, names: tuple[str, ...]) -> float:
        """Mean distance between server and trainer; EngineError if they are not the same policy."""
        drawn = self.server.complete(
            model, self.prompt, SamplingParams(probe.DRAWN_TOKENS, temperature=0), eos_ids=[]
        )
        whole = self.prompt + drawn.tokens
        scored_L = self.server.score(model, whole)
        ours_L = self._ours(names, whole)
        wrong = probe.mismatch(
            scored_L, torch.tensor(drawn.logprobs), ours_L, self.others, self.tolerance
        )
        if wrong is not None:
            raise EngineError(
                f"the vLLM server at {self.server.url} does not sample from the policy after the "
                f"sync of step {step} ({name}, {self.mode}): {wrong}; {self._advice}",
                code="stale_weights",
                category="infra",
                param=f"{self.spec.rollout_field}.engine",
            )
        self.others["the last sync"] = ours_L[: len(self.prompt) - 1]
        return probe.mean_distance(scored_L, ours_L)

    @property
    def _advice(self) -> str:
        """What to do about a server that did not follow."""
        if self.mode == "adapter":
            return (
                f"restart it with --dtype {self._dtype}, let nobody else load adapters on it, and "
                "run the job again, it goes on from its last checkpoint"
            )
        tied = bool(getattr(self.policy.model.config, "tie_word_embeddings", False))
        if tied and self.policy.full:
            return (
                f"start it with --dtype {self._dtype}, for this run alone, and, since vLLM's CPU "
                "build may keep the old output head of a model with tied embeddings, on an untied "
                "copy: python -m bridge_engine.rollout.serving_weights MODEL FOLDER"
            )
        return f"start it with --dtype {self._dtype}, on the same model, for this run alone"

    @property
    def _dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _ours(self, names: tuple[str, ...], tokens: Sequence[int]) -> torch.Tensor:
        return probe.trainer_logprobs(self.policy, names, tokens)

    # ------------------------------------------------------------------ sampling

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        rng: Draws = None,
        repeats: int = 1,
    ) -> list[Completion]:
        """See `Sampler`. Every row is a request with a seed of its own, drawn from `rng`: who draws
        it, and beside whom, does not matter. At most `rollout.batch_size` are under way at once."""
        if self.syncs == 0:
            raise RuntimeError("sync() comes before sample()")
        self._check_context(prompts, params)
        total = len(prompts) * repeats
        if rng is None and params.temperature > 0:
            raise ValueError("only greedy decoding needs no generator")
        seeds = _seeds(total, rng)

        def draw(row: int) -> Completion:
            return self.server.complete(
                self.model,
                prompts[row // repeats],
                params,
                eos_ids=self.policy.eos_ids,
                seed=seeds[row],
            )

        def draw_all(rows: Sequence[int]) -> list[Completion]:
            with ThreadPoolExecutor(min(len(rows), self.spec.rollout.batch_size)) as pool:
                return list(pool.map(draw, rows))

        return self.world.spread(range(total), draw_all)

    def _check_context(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
        """vLLM cuts a completion short where the context ends, without a word."""
        needed = max(map(len, prompts)) + params.max_new_tokens
        if needed > self.base.context:
            field = f"{self.spec.rollout_field}.max_new_tokens"
            raise EngineError(
                f"the vLLM server at {self.server.url} takes {self.base.context} tokens, prompt "
                f"and completion together, and {needed} are needed; start it with "
                f"--max-model-len {needed}, or lower {field}",
                code="vllm_context",
                param=field,
            )

    def software(self) -> dict[str, str]:
        """See `Sampler`."""
        return {"vllm": self.world.first(self.server.version)}

    def close(self) -> None:
        """Takes the served adapter away, where the server still answers, and its files."""
        if self.serving is not None and self.world.is_first:
            try:
                self._withdraw(self.serving)
            except EngineError:
                shutil.rmtree(self.folder / self.serving, ignore_errors=True)
        self.serving = None
        self.server.close()


def _seeds(rows: int, draws: Draws) -> list[int | None]:
    """A seed for each row's request; None where nothing is random."""
    if draws is None:
        return [None] * rows
    if isinstance(draws, torch.Generator):
        return [*torch.randint(SEEDS, (rows,), generator=draws).tolist()]
    return [int(torch.randint(SEEDS, (1,), generator=one)) for one in draws]


def shared_folder(run_directory: Path, shared: str | None) -> Path:
    """Where a run puts weights for the server: inside its own directory, or in a folder that
    belongs to this directory of this machine alone under `shared`."""
    run = run_directory.resolve()
    if shared is None:
        return run / "vllm"
    mark = hashlib.sha256(f"{platform.node()}:{run}".encode()).hexdigest()[:12]
    return Path(shared).resolve() / f"run-{mark}"


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _misconfigured(variable: str, value: str, wanted: str) -> EngineError:
    return EngineError(
        f"{variable} is {value!r}; it must be {wanted}",
        code="vllm_misconfigured",
        category="infra",
    )
