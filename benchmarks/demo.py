"""The demo's figures over several seeds: accuracy before and after, and the time it took.

    python benchmarks/demo.py --seeds 0 1 2

Runs `bridge demo` as a user would, each seed in a fresh home, and prints a Markdown table.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--port", type=int, default=8400)
    options = parser.parse_args()
    print("| seed | before | after | job (s) | whole demo (s) |\n|---|---|---|---|---|")
    for seed in options.seeds:
        with tempfile.TemporaryDirectory(prefix="bridge-demo-") as home:
            began = time.monotonic()
            subprocess.run(
                [
                    *(sys.executable, "-m", "bridge_client.cli", "demo", "--stop"),
                    *("--home", home, "--port", str(options.port), "--seed", str(seed)),
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            whole = time.monotonic() - began
            figures = json.loads((Path(home) / "demo.json").read_text())
        before, after = (_percent(figures, when) for when in ("before", "after"))
        print(f"| {seed} | {before} | {after} | {figures['seconds']:.0f} | {whole:.0f} |")
    cores = len(os.sched_getaffinity(0))
    print(
        f"\n{cores} cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {version('torch')}, transformers {version('transformers')}"
    )


def _percent(figures: dict, when: str) -> str:
    low, high = figures[f"accuracy_{when}_ci"]
    return f"{100 * figures[f'accuracy_{when}']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    main()
