"""Every method's example side by side, by the engine alone: accuracy, seconds a step, peak memory.

    python benchmarks/methods.py --steps 80 --seeds 0
    python benchmarks/methods.py --steps 3 --on examples/smollm2-gsm8k-bridge.yaml --no-eval
    python benchmarks/methods.py --steps 8 --no-eval --clock cpu        on a busy machine

The specs are examples/arithmetic-*.yaml at equal numbers of steps, which are not equal numbers of
rollouts or seconds; the table shows those too. `--on` takes everything but the method from another
spec. One line a method and seed, as Markdown; `page` is the method's length in lines, its options,
equations and docstring included. `s/step` is the mean over all steps but the first, which warms up:
a mean, because some methods take cheap steps and dear ones in turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import yaml

from bridge_engine import methods
from bridge_engine.methods import NAMES

PAGES = Path(methods.__file__).parent
EXAMPLES = Path(__file__).parent.parent / "examples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(NAMES))
    parser.add_argument("--on", type=Path, help="a spec to take everything but the method from")
    parser.add_argument("--no-eval", action="store_true", help="time alone, no accuracy")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: the engine's own CPU seconds, where the machine does other work too",
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sys.exit(_run(*options.child, options.clock))
    print(
        "| method | page | seed | before | after | seconds | s/step | of it sampling | "
        "peak RSS (MB) |\n|---|---|---|---|---|---|---|---|---|"
    )
    for method in options.methods:
        for seed in options.seeds:
            spec = _spec(method, options.on) | {"steps": options.steps, "seed": seed}
            if options.no_eval:
                spec["data"].pop("eval", None)
            with tempfile.TemporaryDirectory() as folder:
                print(_line(method, spec, Path(folder), options.clock), flush=True)


def _spec(method: str, on: Path | None) -> dict:
    spec = yaml.safe_load((EXAMPLES / f"arithmetic-{method.replace('_', '-')}.yaml").read_text())
    return spec if on is None else {**yaml.safe_load(on.read_text()), "method": spec["method"]}


def _run(spec: str, directory: str, clock: str) -> int:
    """The engine on a spec, in this process; its `time/…` figures are read off the given clock."""
    from bridge_engine import exploration, run, trainer

    if clock == "cpu":
        trainer.time = exploration.time = SimpleNamespace(monotonic=time.process_time)
    return run.main(["run", spec, "--dir", directory])


def _line(method: str, spec: dict, folder: Path, clock: str) -> str:
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    command = [sys.executable, __file__, "--clock", clock, "--child"]
    command += [str(folder / "spec.yaml"), str(folder / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{method} failed; run its spec by hand to see why")
    peak = usage.ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    accuracy = [row["accuracy"] for row in rows if "accuracy" in row]
    timed = [row for row in rows if "time/step" in row]
    timed = timed[1:] or timed
    step = statistics.mean(row["time/step"] for row in timed)
    sampling = statistics.mean(row.get("time/sampling", 0.0) for row in timed)
    events = (folder / "run/events.jsonl").read_text().splitlines()
    seconds = json.loads(events[-1])["result"]["seconds"]
    page = len((PAGES / f"{method}.py").read_text().splitlines())
    before, after = (f"{100 * accuracy[i]:.1f}" if accuracy else "" for i in (0, -1))
    return (
        f"| {method} | {page} | {spec['seed']} | {before} | {after} | {seconds:.0f} | "
        f"{step:.3f} | {sampling:.3f} | {peak:.0f} |"
    )


if __name__ == "__main__":
    main()
