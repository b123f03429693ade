"""Every method's example side by side, by the engine alone: accuracy, seconds a step, peak memory.

    python benchmarks/methods.py --steps 80 --seeds 0

The specs are examples/arithmetic-*.yaml at equal numbers of steps, which are not equal numbers of
rollouts or seconds; the table shows those too. One line a method and seed, as Markdown.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

EXAMPLES = Path(__file__).parent.parent / "examples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    print("| method | seed | before | after | seconds | s/step | of it sampling | peak RSS (MB) |")
    print("|---|---|---|---|---|---|---|---|")
    for example in sorted(EXAMPLES.glob("arithmetic-*.yaml")):
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                print(_line(example, options.steps, seed, Path(folder)), flush=True)


def _line(example: Path, steps: int, seed: int, folder: Path) -> str:
    spec = {**yaml.safe_load(example.read_text()), "steps": steps, "seed": seed}
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    command = [sys.executable, "-m", "bridge_engine", "run", str(folder / "spec.yaml")]
    process = subprocess.Popen([*command, "--dir", str(folder / "run")], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{example.name} failed: {folder / 'run'}")
    peak = usage.ru_maxrss / (1 if sys.platform == "darwin" else 1024)
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    accuracy = [row["accuracy"] for row in rows if "accuracy" in row]
    step = statistics.median(row["time/step"] for row in rows if "time/step" in row)
    sampling = [row.get("time/sampling", 0.0) for row in rows if "time/step" in row]
    events = (folder / "run/events.jsonl").read_text().splitlines()
    seconds = json.loads(events[-1])["result"]["seconds"]
    name = spec["method"] if isinstance(spec["method"], str) else spec["method"]["name"]
    return (
        f"| {name} | {seed} | {100 * accuracy[0]:.1f} | {100 * accuracy[-1]:.1f} | {seconds:.0f} | "
        f"{step:.3f} | {statistics.median(sampling):.3f} | {peak:.0f} |"
    )


if __name__ == "__main__":
    main()
