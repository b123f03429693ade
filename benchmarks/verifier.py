r"""How good and how fast the verifier is, beside math-verify alone and Qwen's rule.

    python benchmarks/verifier.py corpus        # agreement on tests/support/verifier_corpus.py
    python benchmarks/verifier.py throughput    # answers a second and core; needs BRIDGE_DATA_DIR
    python benchmarks/verifier.py hostile       # 1000 hostile answers among 1000 good ones

`Qwen's rule` is the grader of Qwen2.5-Math as its authors describe it, written anew here: numbers
to 1e-4 with a percent sign free to be there or not, brackets and units dropped, lists entry by
entry, equations by the difference of their sides, sympy for the rest. Times are CPU seconds of all
processes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from bridge_engine.data.rows import numbered_rows
from bridge_engine.rewards import Verifier, stated_answer
from tests.support import notations
from tests.support import verifier_corpus as corpus

Pair = tuple[str, str]
"""(gold answer, completion)."""

PATIENCE = 10
"""Seconds a peer gets for one pair of the corpus; then it counts as unjudged."""

# --------------------------------------------------------------------------- the peers


def math_verify(gold: str, completion: str) -> bool:
    """math-verify as its README uses it, without its time limits, which need signals."""
    from math_verify import parse, verify

    golds = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    return bool(verify(golds, parse(completion, parsing_timeout=None), timeout_seconds=None))


def qwen(gold: str, completion: str) -> bool:
    """Qwen2.5-Math's rule."""
    stated = stated_answer(completion)
    return stated is not None and _qwen_equal(_stripped(stated), _stripped(gold))


def _stripped(text: str) -> str:
    text = text.strip().rstrip(".").replace("\n", "").replace("\\!", "").replace("tfrac", "frac")
    text = text.replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    text = re.sub(r"\\text\{.*?\}|\\mbox\{.*?\}", _unit_or_word, text)
    for gone in ("^{\\circ}", "^\\circ", "\\$", "$", "\\%", "%", "\\(", "\\)", "\\,", "\\ "):
        text = text.replace(gone, "")
    if text.count("=") == 1 and len(text.split("=")[0]) <= 2:
        text = text.split("=")[1]
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
    return text.replace(" ", "")


def _unit_or_word(found: re.Match[str]) -> str:
    """A word that is the whole answer stays; behind a number it is a unit and goes."""
    inside = found[0].partition("{")[2][:-1]
    return inside if found.start() == 0 else ""


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _qwen_equal(stated: str, gold: str, percent: bool = True) -> bool:
    if stated.lower() == gold.lower():
        return True
    one, other = _number(stated), _number(gold)
    if one is not None and other is not None:
        near = (other / 100, other, other * 100) if percent else (other,)
        return any(abs(one - n) <= 1e-4 * max(abs(one), abs(n)) for n in near)
    if not stated:
        return False
    bare = [re.sub(r"[{}()\[\]]", "", t) for t in (stated, gold)]
    if bare[0].lower() == bare[1].lower():
        return True
    if all(re.match(r"[(\[].+[)\]]$", t) for t in (stated, gold)):
        parts = [t[1:-1].split(",") for t in (stated, gold)]
        if len(parts[0]) == len(parts[1]):
            return all(_qwen_equal(a, b, percent) for a, b in zip(*parts, strict=True))
    if stated.count("=") == 1 and gold.count("=") == 1:
        sides = [t.split("=") for t in (stated, gold)]
        a, b = (f"{left}-({right})" for left, right in sides)
        return _symbolic(a, b) or _symbolic(f"-({a})", b)
    return _symbolic(stated, gold)


def _symbolic(one: str, other: str) -> bool:
    from latex2sympy2_extended import latex2sympy
    from sympy import N, simplify

    try:
        a, b = latex2sympy(one), latex2sympy(other)
        if a == b or simplify(a - b) == 0:
            return True
        return bool(abs(N(a) - N(b)) <= 1e-3 * max(abs(N(a)), abs(N(b))))
    except Exception:
        return one == other


# --------------------------------------------------------------------------- the corpus


def agreement() -> dict[str, dict[str, float]]:
    """Each grader on the corpus, judged by hand."""
    pairs = [(gold, rf"\boxed{{{stated}}}") for _, gold, stated, _, _ in corpus.pairs()]
    wants = [want for *_, want, _ in corpus.pairs()]
    with Verifier(20.0) as verifier:
        ours = [v.value for v in verifier.judge(pairs)]
    found = {"ours": ours}
    for name, grader in (("math-verify", math_verify), ("Qwen's rule", qwen)):
        found[name] = [_guarded(grader, *pair) for pair in pairs]
    return {name: _counts(values, wants) for name, values in found.items()}


def _guarded(grader: Callable[[str, str], bool], gold: str, completion: str) -> bool | None:
    def stop(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(PATIENCE)
    try:
        return grader(gold, completion)
    except Exception:
        return None
    finally:
        signal.alarm(0)


def _counts(values: Sequence[bool | None], wants: Sequence[str]) -> dict[str, float]:
    clear = [(v, w == "right") for v, w in zip(values, wants, strict=True) if w != "unjudged"]
    agree = sum(v is w for v, w in clear)
    return {
        "pairs": len(clear),
        "agreement": round(agree / len(clear), 4),
        "false_positives": sum(v is True and not w for v, w in clear),
        "false_negatives": sum(v is False and w for v, w in clear),
        "unjudged": sum(v is None for v, _ in clear),
    }


# --------------------------------------------------------------------------- throughput


def gsm8k_like(rows: int, rng: random.Random) -> list[tuple[Pair, bool]]:
    """Whole numbers as GSM8K's models write them; one in two wrong."""
    golds = [e.answer for e in _examples("gsm8k_test.jsonl", rows)]
    made = []
    for gold in golds:
        right = rng.random() < 0.5
        stated = gold if right else str(int(gold.replace(",", "")) + rng.randint(1, 9))
        forms = ["#### {}", r"So it is \boxed{{{}}}.", r"\boxed{{{}.00}}", r"\boxed{{\${}}}"]
        form = rng.choice(forms)
        made.append(((gold, form.format(stated)), right))
    return made


def math500_like(rows: int, rng: random.Random) -> list[tuple[Pair, bool]]:
    """MATH500's answers, one in two right: half of those as they are, half in another notation;
    wrong ones are the answers of other problems."""
    golds = [e.answer for e in _examples("math500.jsonl", rows)]
    made = []
    for gold in golds:
        right = rng.random() < 0.5
        stated = gold
        if not right:
            stated = rng.choice([g for g in golds if g != gold])
        elif rng.random() < 0.5:
            stated = rng.choice(notations.of(gold))
        made.append(((gold, rf"Therefore \boxed{{{stated}}}."), right))
    return made


def _examples(name: str, rows: int):
    path = Path(os.environ["BRIDGE_DATA_DIR"]) / name
    return [example for _, _, example in numbered_rows(path)][:rows]


def throughput(made: list[tuple[Pair, bool]]) -> dict[str, float]:
    """Answers a CPU second, ours and bare math-verify's, each in one process of its own kind."""
    pairs, truth = [p for p, _ in made], [t for _, t in made]
    with Verifier(20.0) as verifier:
        verifier.judge(
            [("5x", r"\boxed{x5}")]
        )  # its child is up, and the parser's tables are built
        before = _cpu(verifier.pids)
        ours = [v.value for v in verifier.judge(pairs)]
        mine = _cpu(verifier.pids) - before
    math_verify("5x", r"\boxed{x5}")
    started = time.process_time()
    theirs = [math_verify(*pair) for pair in pairs]
    bare = time.process_time() - started
    where_right = [(o, t) for o, m, t in zip(ours, theirs, truth, strict=True) if m is t]
    return {
        "answers": len(pairs),
        "ours_per_core_second": round(len(pairs) / mine, 1),
        "math_verify_per_core_second": round(len(pairs) / bare, 1),
        "ratio": round(bare / mine, 1),
        "ours_right": sum(o is t for o, t in zip(ours, truth, strict=True)),
        "math_verify_right": sum(m is t for m, t in zip(theirs, truth, strict=True)),
        "differ_where_math_verify_is_right": sum(o is not t for o, t in where_right),
    }


def _cpu(pids: Sequence[int]) -> float:
    """CPU seconds of this process and the judging ones."""
    times = [psutil.Process(pid).cpu_times() for pid in [os.getpid(), *pids]]
    return sum(t.user + t.system for t in times)


# --------------------------------------------------------------------------- hostile answers


def hostile(count: int, rng: random.Random, timeout: float) -> dict[str, float]:
    """`count` hostile answers among as many good ones: are all the good ones judged?"""
    kinds = [
        lambda n: f"9^{{9^{{9^{{{n}^{n}}}}}}}",
        lambda n: "7" * 10**6 + str(n),
        lambda n: "{" * (1000 + n),
        lambda n: r"\frac{" * 800 + str(n),
        lambda n: "(" * 400 + f"x+{n}" + ")" * 400,
        lambda n: f"\x00{n}\x00",
        lambda n: f"{10**6 + n}!",
        lambda n: r"\sqrt{" * 60 + str(n) + "}" * 60,
    ]
    bad = [("5x", f"\\boxed{{{kinds[n % len(kinds)](n)}}}") for n in range(count)]
    good = [("5x", rf"\boxed{{{n}x}}") for n in range(count)]
    everything = [(p, False) for p in bad] + [(p, True) for p in good]
    rng.shuffle(everything)
    started = time.monotonic()
    with Verifier(timeout, workers=2) as verifier:
        verdicts = verifier.judge([p for p, _ in everything])
    reasons: Counter[str] = Counter()
    judged = 0
    for (pair, is_good), verdict in zip(everything, verdicts, strict=True):
        if is_good:
            judged += verdict.value is (pair[1] == r"\boxed{5x}")
        else:
            reasons[verdict.reason] += 1
            assert verdict.value is not True, pair[1][:80]
    return {
        "good": count,
        "good_judged_rightly": judged,
        "hostile": count,
        "seconds": round(time.monotonic() - started, 1),
        **{f"hostile/{reason}": n for reason, n in reasons.most_common()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["corpus", "throughput", "hostile"])
    parser.add_argument("--rows", type=int, default=500, help="answers of each kind")
    parser.add_argument("--hostile", type=int, default=1000, help="hostile answers")
    parser.add_argument("--timeout", type=float, default=1.0, help="seconds a hostile answer gets")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    rng = random.Random(0)
    if options.what == "corpus":
        found: object = agreement()
    elif options.what == "throughput":
        found = {
            "gsm8k-like": throughput(gsm8k_like(options.rows, rng)),
            "math500-like": throughput(math500_like(options.rows, rng)),
        }
    else:
        found = hostile(options.hostile, rng, options.timeout)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
