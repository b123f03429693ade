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
from typing import Any


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
    judge("\\frac{1}{2}", "0.5")  # builds the parser's tables before the clock runs
    _write(answers, {"ready": True})
    for line in sys.stdin.buffer:
        question = json.loads(line)
        _limit_cpu(question["seconds"])
        _write(answers, judge(question["gold"], question["stated"]))


def judge(gold: str, stated: str) -> dict[str, Any]:
    """math-verify's verdict: {"value": true | false | null, "reason": …}."""
    from math_verify import parse, verify

    try:
        gold_parsed = parse(_boxed(gold), parsing_timeout=None)
        if not gold_parsed:
            return {"value": None, "reason": "the gold answer cannot be read as mathematics"}
        stated_parsed = parse(_boxed(stated), parsing_timeout=None)
        if not stated_parsed:
            return {"value": False, "reason": "the stated answer cannot be read as mathematics"}
        # verify is not symmetric: the gold answer comes first.
        right = bool(verify(gold_parsed, stated_parsed, timeout_seconds=None))
    except MemoryError:
        return {"value": None, "reason": "judging the answer needs too much memory"}
    except RecursionError:
        return {"value": None, "reason": "the answer is nested too deeply to judge"}
    return {"value": right, "reason": "math-verify"}


def _boxed(answer: str) -> str:
    """One answer as math-verify reads it best. Dollar signs go: between them it would see several
    answers, any of which could be right."""
    return "\\boxed{" + answer.replace("\\$", "").replace("$", "") + "}"


def _limit_cpu(seconds: float) -> None:
    """Some time after its deadline the kernel ends a computation nobody is left to kill."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + 2 * seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _write(stream: Any, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
