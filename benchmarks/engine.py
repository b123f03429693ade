"""Our step beside that of TRL's GRPOTrainer, in one run; where ours goes; BRIDGE and its floor.

    python benchmarks/engine.py                        every row: about 20 minutes on one core
    python benchmarks/engine.py --rows tiny-full tiny-lora --repeats 9

Both sides train the same model in one dtype on the same problems with equal numbers of tokens (EOS
is never drawn), by GRPO with beta 0, one update a batch, AdamW and clipping, without gradient
checkpointing. Every answer at an odd place counts as right, so that every group teaches something
and no rollout can be skipped; TRL's reward costs nothing, ours comes after the real verifier has
read the answer. Their steps alternate within one process, after one of each to warm up; seconds are
medians. Peak memory is the resident set of a process of its own, a few steps long.

BRIDGE's floor is what a step cannot do without: sampling, a pass of J_RL through (θ,w), one through
(θ̂,w) and a pass of J_SFT, each timed alone, between whole steps. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from bridge_engine.events import EventWriter, Metric
from bridge_engine.models.folders import materialize_model
from bridge_engine.parameters import ParameterSet
from bridge_engine.policy import Policy
from bridge_engine.process.compute import configure
from bridge_engine.rewards import Verdict, Verifier
from bridge_engine.spec.train import TrainSpec
from bridge_engine.state.run_state import Progress
from bridge_engine.trainer import Trainer

MEGABYTE = 2**20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
now = CLOCKS["wall"]
PARTS = ("sampling", "verification", "forward", "backward", "optimiser", "events")
MEMORY_STEPS = 2
"""The second is the first whose gradients exist beside the moments of the optimiser."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a model, what of it is trained, and how much a step writes."""

    model: str
    student: str
    prompts: int
    group: int
    tokens: int
    demos: int
    dtype: str = "float32"


ROWS = {
    "tiny-full": Row("bridge-tiny", "full", 8, 8, 32, 16),
    "tiny-lora": Row("bridge-tiny", "lora", 8, 8, 32, 16),
    "smollm2-full": Row("smollm2-135m-instruct", "full", 4, 4, 48, 8),
    "smollm2-lora": Row("smollm2-135m-instruct", "lora", 4, 4, 48, 8),
    "smollm2-full-bf16": Row("smollm2-135m-instruct", "full", 4, 4, 48, 8, "bfloat16"),
    "smollm2-lora-bf16": Row("smollm2-135m-instruct", "lora", 4, 4, 48, 8, "bfloat16"),
}
"""In bfloat16 each as it does it: ours holds a frozen base in it and computes a full student's
products in it; TRL, of which that is the default, computes those of float32 weights in it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=5, help="steps of each side that count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: where the machine does other work too"
    )
    parser.add_argument("--no-trl", action="store_true", help="BRIDGE and its floor alone")
    parser.add_argument("--no-bridge", action="store_true", help="leave BRIDGE's floor out")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--child", choices=JOBS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    global now
    now = CLOCKS[options.clock]
    if options.child:
        found = JOBS[options.child](ROWS[options.rows[0]], options.repeats, options.threads)
        print(json.dumps(found))
        return
    print(
        f"torch {version('torch')}, transformers {version('transformers')}, trl {version('trl')}, "
        f"{options.threads} thread(s), medians of {options.repeats} alternating steps\n"
    )
    if not options.no_trl:
        beside_trl(options)
    if not options.no_bridge:
        beside_its_floor(options)


def beside_trl(options: argparse.Namespace) -> None:
    print(
        f"| | ours s/step | TRL s/step | TRL / ours | ours peak MB | TRL peak MB | "
        f"{' | '.join(PARTS)} | rest |\n|{'---|' * (len(PARTS) + 7)}"
    )
    for name in options.rows:
        found = child("both", name, options)
        memory = ["", ""]
        if not options.no_memory:
            memory = [f"{child(side, name, options)['peak_mb']:.0f}" for side in ("ours", "trl")]
        ours, trl = found["ours"], found["trl"]
        parts = [found["parts"][part] for part in PARTS]
        cells = [f"{ours:.3f}", f"{trl:.3f}", f"**{trl / ours:.2f}**", *memory]
        cells += [f"{seconds:.4f}" for seconds in [*parts, ours - sum(parts)]]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def beside_its_floor(options: argparse.Namespace) -> None:
    print(
        "\n| BRIDGE | s/step | sampling | J_RL(θ,w) | J_RL(θ̂,w) | J_SFT(θ,w) | step / floor |\n"
        f"|{'---|' * 7}"
    )
    for name in options.rows:
        found = child("bridge", name, options)
        step, floor = found["step"], found["floor"]
        cells = [f"{s:.3f}" for s in (step, *floor)] + [f"**{step / sum(floor):.2f}**"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def child(job: str, row: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a process of its own."""
    command = [sys.executable, __file__, "--child", job, "--rows", row]
    command += ["--repeats", str(options.repeats), "--threads", str(options.threads)]
    command += ["--clock", options.clock]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# --------------------------------------------------------------------------- ours


class EveryOther(Verifier):
    """The verifier, whose word is then overruled: at odd places right, at even ones wrong."""

    def judge(self, pairs: Any) -> list[Verdict]:
        found = super().judge(pairs)
        return [Verdict(bool(place % 2), v.reason, v.fast) for place, v in enumerate(found)]


class Ours:
    """The real trainer, one step at a time, with its events; nothing is saved or evaluated."""

    def __init__(self, row: Row, threads: int, folder: str, method: str = "rl") -> None:
        problems = {"name": "arithmetic", "limit": row.prompts}  # each step draws them all
        data: dict[str, Any] = {"prompts": problems}
        if method == "bridge":
            data["demos"] = {"name": "arithmetic", "split": "demos", "limit": row.demos}
        self.spec = TrainSpec.model_validate(
            {
                "model": row.model,
                "method": method,
                "data": data,
                "student": row.student,
                "steps": 10**6,
                "rollout": {
                    "prompts_per_step": row.prompts,
                    "group_size": row.group,
                    "max_new_tokens": row.tokens,
                },
                "optimizer": {"student_lr": 1e-6, "teacher_lr": 1e-6},
                "sft": {"batch_size": row.demos},
                "checkpoint": {"every": 10**6},
                "eval": {"every": 0},
                "runtime": {"threads": threads, "device": "cpu", "dtype": row.dtype},
            }
        )
        configure(self.spec)
        self.trainer = Trainer(self.spec, Path(folder), EventWriter(Path(folder)))
        self.trainer.explorer.verifier = EveryOther()
        self.trainer.policy.eos_ids = []  # no token ends a completion
        self.progress = Progress(step=1)  # the first step of a run reports samples too

    @property
    def prompts(self) -> list[list[int]]:
        data = self.trainer.data
        return [data.prompt(example) for example in data.prompts]

    def step(self) -> None:
        with ours_only():
            metrics = self.trainer._advance(self.progress)
            self.trainer.events.emit(Metric(step=self.progress.step, metrics=metrics))

    def close(self) -> None:
        self.trainer.explorer.verifier.close()


@contextmanager
def ours_only() -> Iterator[None]:
    """Torch's deterministic mode, which our runs ask for and TRL's need not pay for."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Clock:
    """Adds up the seconds of the parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._now: dict[str, float] = defaultdict(float)

    def watch(self, part: str, owner: Any, name: str) -> None:
        """Times every call of a method from now on."""
        method = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            began = now()
            try:
                return method(*args, **options)
            finally:
                self._now[part] += now() - began

        setattr(owner, name, timed)

    def start_of_step(self) -> None:
        self._now.clear()

    def end_of_step(self) -> None:
        for part, seconds in self._now.items():
            self.seconds[part].append(seconds)

    def median(self, part: str) -> float:
        return statistics.median(self.seconds[part]) if self.seconds[part] else 0.0


def watched(ours: Ours) -> Clock:
    clock = Clock()
    clock.watch("sampling", ours.trainer.explorer, "sample")
    clock.watch("verification", ours.trainer.explorer.examiner, "verdicts")
    clock.watch("forward", Policy, "logprobs")
    clock.watch("backward", torch.Tensor, "backward")
    clock.watch("optimiser", ParameterSet, "ascend")
    clock.watch("events", ours.trainer.events, "emit")
    return clock


# --------------------------------------------------------------------------- TRL


def run_trl(
    row: Row, prompts: list[list[int]], steps: int, threads: int, after: Callable[[], None]
) -> list[float]:
    """Seconds of each step of a real GRPOTrainer; `after` is called between them, off the clock."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    folder = materialize_model(row.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    assert [tokenizer(text)["input_ids"] for text in texts] == prompts, "not the same prompts"
    seconds: list[float] = []

    class Between(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(now() - self.began)
            after()
            self.began = now()

    def every_other(completions: list[str], **_: Any) -> list[float]:
        return [float(place % 2) for place in range(len(completions))]

    with tempfile.TemporaryDirectory() as output:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            processing_class=tokenizer,
            reward_funcs=every_other,
            train_dataset=Dataset.from_dict({"prompt": texts}),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
            if row.student == "lora"
            else None,
            args=GRPOConfig(
                output_dir=output,
                use_cpu=True,
                bf16=row.dtype == "bfloat16",
                gradient_checkpointing=False,
                per_device_train_batch_size=row.prompts * row.group,
                num_generations=row.group,
                max_completion_length=row.tokens,
                generation_kwargs={"min_new_tokens": row.tokens},
                beta=0.0,
                max_steps=steps,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            callbacks=[Between()],
        )
        torch.set_num_threads(threads)
        trainer.train()
    return seconds


# --------------------------------------------------------------------------- what a child measures


def both(row: Row, repeats: int, threads: int) -> dict[str, Any]:
    """Alternating steps of both, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(row, threads, folder)
        clock = watched(ours)
        mine: list[float] = []

        def step() -> None:
            torch.set_num_threads(threads)
            clock.start_of_step()
            began = now()
            ours.step()
            mine.append(now() - began)
            clock.end_of_step()
            if len(mine) == 1:  # the first step warms up
                clock.seconds.clear()

        theirs = run_trl(row, ours.prompts, repeats + 1, threads, step)
        ours.close()
        return {
            "ours": statistics.median(mine[1:]),
            "trl": statistics.median(theirs[1:]),
            "parts": {part: clock.median(part) for part in PARTS},
        }


def ours_alone(row: Row, repeats: int, threads: int) -> dict[str, Any]:
    """Peak memory of our trainer."""
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(row, threads, folder)
        for _ in range(MEMORY_STEPS):
            ours.step()
        ours.close()
    return {"peak_mb": peak_mb()}


def trl_alone(row: Row, repeats: int, threads: int) -> dict[str, Any]:
    """Peak memory of TRL's trainer; the prompts come from ours in yet another process."""
    command = [sys.executable, __file__, "--child", "prompts", "--threads", str(threads)]
    command += ["--rows", next(name for name, known in ROWS.items() if known == row)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    prompts = json.loads(done.stdout.splitlines()[-1])["prompts"]
    run_trl(row, prompts, MEMORY_STEPS, threads, lambda: None)
    return {"peak_mb": peak_mb()}


def only_prompts(row: Row, repeats: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return {"prompts": Ours(row, threads, folder).prompts}


def bridge(row: Row, repeats: int, threads: int) -> dict[str, Any]:
    """Whole steps of BRIDGE, and between them each of their parts alone."""
    from bridge_engine.token_objectives import TokenObjectives

    with tempfile.TemporaryDirectory() as folder, ours_only():
        ours = Ours(row, threads, folder, "bridge")
        trainer = ours.trainer
        groups, _ = trainer.explorer.explore(1, 1)
        objectives = TokenObjectives(
            trainer.policy, trainer.method, ours.spec, demos=trainer.data.demos, groups=groups
        )
        prompts = ours.prompts
        ways: list[Callable[[], Any]] = [
            ours.step,
            lambda: draw(trainer, prompts, row),
            lambda: objectives.gradient("student", rl=1.0),
            lambda: objectives.gradient("shadow", rl=1.0),
            lambda: objectives.gradient("student", sft=1.0),
        ]
        seconds: list[list[float]] = [[] for _ in ways]
        for repeat in range(repeats + 1):
            for taken, way in zip(seconds, ways, strict=True):
                torch.use_deterministic_algorithms(True, warn_only=True)
                began = now()
                way()
                if repeat:
                    taken.append(now() - began)
        ours.close()
    step, *floor = [statistics.median(taken) for taken in seconds]
    return {"step": step, "floor": floor}


def draw(trainer: Trainer, prompts: list[list[int]], row: Row) -> None:
    from bridge_engine.rollout import SamplingParams

    trainer.explorer.sample(
        prompts, SamplingParams(row.tokens), rng=torch.Generator().manual_seed(0), repeats=row.group
    )


def peak_mb() -> float:
    """Largest resident set of this process so far."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(peak, psutil.Process().memory_info().rss) / MEGABYTE


JOBS: dict[str, Callable[[Row, int, int], dict[str, Any]]] = {
    "both": both,
    "ours": ours_alone,
    "trl": trl_alone,
    "bridge": bridge,
    "prompts": only_prompts,
}

if __name__ == "__main__":
    main()
