"""The engine's command line for torchrun, writing down what each rank judges, and failing if told.

`each FOLDER …` instead of `run` trains `FOLDER/spec.yaml` in `FOLDER/run`, one after the other:
what a short run takes is mostly the start of its processes. They meet once.

JUDGED: a folder; rank k appends each pair that it judges to `k.jsonl` there, as a line. With `each`
it is the folder's own `judged`.
HOLD: see `held_engine.py`.
TROUBLE: `RANK:KIND`; that rank gets into that trouble when it judges for the third time.
"""

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

from bridge_engine.distributed.ranks import join, leave
from bridge_engine.errors import EngineError
from bridge_engine.rewards import Verifier
from bridge_engine.run import main, run
from tests.support.held_engine import hold

_judge = Verifier.judge
_times = 0


def _trouble(kind):
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory":
        raise MemoryError
    if kind == "bug":
        raise ZeroDivisionError("a bug")
    raise EngineError("the verifier did not start", code="verifier_failed", category="infra")


def judge(self, pairs):
    global _times
    _times += 1
    rank = os.environ.get("RANK", "0")
    where, _, kind = os.environ.get("TROUBLE", "").partition(":")
    if where == rank and _times == 3:
        _trouble(kind)
    if folder := os.environ.get("JUDGED"):
        with (Path(folder) / f"{rank}.jsonl").open("a") as file:
            file.writelines(json.dumps([case.gold, case.text]) + "\n" for case in pairs)
    return _judge(self, pairs)


def each(folders):
    with join() as world, mock.patch("bridge_engine.run.join", return_value=nullcontext(world)):
        for folder in map(Path, folders):
            os.environ["JUDGED"] = str(folder / "judged")
            if status := run(folder / "spec.yaml", folder / "run"):
                return status
    return 0


Verifier.judge = judge
if __name__ == "__main__":
    hold()
    leave(each(sys.argv[2:]) if sys.argv[1] == "each" else main())
