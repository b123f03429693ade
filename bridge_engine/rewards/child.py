"""The process in which math-verify runs: one question a line, one answer a line, both JSON.

Run as `python -m bridge_engine.rewards.child MEMORY_BYTES`. It may hang, swallow memory or crash
as mathematics pleases; `bridge_engine.rewards.pool` holds the clock and kills it. Should the parent
die first, the end of standard input ends the child, and a limit on CPU time ends it even in the
middle of a computation.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from functools import partial
from typing import Any

from bridge_engine.rewards import compare, slow
from bridge_engine.rewards.findings import unjudged


def main() -> None:
    """Answers questions until standard input ends."""
    # Stopping is the parent's affair: a Ctrl-C or SIGTERM to the whole process group lets the
    # engine finish its step, for which it needs its verdicts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable(logging.CRITICAL)
    slow.leaf("\\frac{x}{2}", "0.5x")  # builds the parser's tables before the clock runs
    _write(answers, {"ready": True})
    for line in sys.stdin.buffer:
        question = json.loads(line)
        _limit_cpu(question["seconds"])
        _write(answers, judge(question["gold"], question["stated"], question["tolerance"]))


def judge(gold: str, stated: str, tolerance: float | None = None) -> dict[str, Any]:
    """The verdict on one answer: {"value": true | false | null, "reason": a word of `findings`}."""
    try:
        found = compare.judge(gold, stated, partial(slow.leaf, tolerance=tolerance))
    except MemoryError:
        found = unjudged("out_of_memory")
    except RecursionError:
        found = unjudged("too_deep")
    return {"value": found.value, "reason": found.reason}


def _limit_cpu(seconds: float) -> None:
    """Some time after its deadline the kernel ends a computation nobody is left to kill."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + 2 * seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _write(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
