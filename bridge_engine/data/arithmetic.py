"""Verifiable arithmetic without end: five kinds of problem, each harder than the one before.

A problem is an expression and a question mark, `12+3-5?`. The expert answers with one true
equation a step and then `#` and the final answer, `12+3=15,15-5=10#10`. Every choice here serves
one end: that a model of under a million parameters can learn the task in minutes on one CPU core
and that methods of training can still be told apart on it.

- **One character is one token**, and the alphabet is digits and `+ - * ( ) = , # ?`. What is
  learned is reasoning, never spelling.
- **Every number met on the way lies in 0..99**, so that one step is a fact a tiny model can hold.
  Problems differ in how many steps they take and in how the next step is found.
- **Answers spread over the whole range.** With answers modulo 10, a guess earns a tenth of the
  reward, and a policy that has learned nothing looks as if it had learned something.
- **The expert writes each equation whole**, repeating the running total (`=15,15-5`). Finding
  the next operand is then a look-up and the sum is local. Look-up needs a copying circuit, which
  is why the base model of `benchmarks/pretrain_tiny.py` practises copying too; and the base's own
  style differs from the expert's, because demonstrations in the base's own words leave nothing to
  learn from them.
- **The last kind composes what the others teach apart** (a product and a parenthesis in one
  problem). By default it is only in `dev` and `test`: it measures what carries over.
- **Splits are disjoint by construction.** A hash of the problem's text decides its split, so no
  seed, no kind and no limit can ever put one problem on both sides.
"""

import difflib
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from bridge_engine.data.example import Example
from bridge_engine.errors import DataError

LARGEST = 99
"""No number in a problem or on the way to its answer is larger (or negative)."""

_TERM = 49
"""Terms are at most half the range, or most sums would leave it."""

_SHARE = {"pretrain": 60, "train": 20, "demos": 8, "dev": 4, "test": 8}
"""Of a hundred problems, how many belong to each split. Changing this moves problems between
splits: a base model pretrained before the change may then have seen the new test problems."""

SPLITS = frozenset(_SHARE)

MOST = 100_000
"""Examples one call makes at most; making so many takes some seconds."""

DEFAULT_LIMIT = {"pretrain": 80_000, "train": 4_000, "demos": 128, "dev": 250, "test": 1_000}
"""How many examples a split has when nobody asks for a number."""

_PATIENCE = 100_000
"""Draws in a row without a new problem after which a kind counts as used up."""


class _OutOfRangeError(Exception):
    """A draft whose numbers leave 0..LARGEST: thrown away and drawn again."""


class _Draft:
    """One problem in the making: draws terms and operators, and works out the expert's steps."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.steps: list[str] = []

    def term(self) -> int:
        return self.rng.randint(1, _TERM)

    def factor(self) -> int:
        return self.rng.randint(2, 9)

    def sign(self) -> str:
        return self.rng.choice("+-")

    def work(self, left: int, operator: str, right: int) -> int:
        """One step of the solution; returns its result."""
        if operator == "*":
            result = left * right
        else:
            result = left + right if operator == "+" else left - right
        if not 0 <= result <= LARGEST:
            raise _OutOfRangeError
        self.steps.append(f"{left}{operator}{right}={result}")
        return result


def _chain(draft: _Draft, terms: int) -> str:
    """A running sum: `12+3-5`."""
    total = draft.term()
    text = str(total)
    for _ in range(terms - 1):
        operator, term = draft.sign(), draft.term()
        text += f"{operator}{term}"
        total = draft.work(total, operator, term)
    return text


def _times(draft: _Draft) -> str:
    """A product first or second in a running sum: `7*8+15-4` or `15+7*8-4`."""
    left, right, term, last = draft.factor(), draft.factor(), draft.term(), draft.term()
    operator, end = draft.sign(), draft.sign()
    product = draft.work(left, "*", right)
    if draft.rng.random() < 0.5:
        text = f"{left}*{right}{operator}{term}"
        total = draft.work(product, operator, term)
    else:
        text = f"{term}{operator}{left}*{right}"
        total = draft.work(term, operator, product)
    draft.work(total, end, last)
    return f"{text}{end}{last}"


def _paren(draft: _Draft) -> str:
    """A parenthesis, worked out first, in a running sum: `40-(12+9)+3`."""
    first, left, right, last = (draft.term() for _ in range(4))
    before, inside, after = (draft.sign() for _ in range(3))
    bracket = draft.work(left, inside, right)
    total = draft.work(first, before, bracket)
    draft.work(total, after, last)
    return f"{first}{before}({left}{inside}{right}){after}{last}"


def _mixed(draft: _Draft) -> str:
    """A product and a parenthesis together: `6*7-(12+9)+4`."""
    one, other = draft.factor(), draft.factor()
    left, right, last = (draft.term() for _ in range(3))
    before, inside, after = (draft.sign() for _ in range(3))
    product = draft.work(one, "*", other)
    bracket = draft.work(left, inside, right)
    total = draft.work(product, before, bracket)
    draft.work(total, after, last)
    return f"{one}*{other}{before}({left}{inside}{right}){after}{last}"


_WRITERS: dict[str, Callable[[_Draft], str]] = {
    "add3": lambda draft: _chain(draft, 3),
    "add5": lambda draft: _chain(draft, 5),
    "times": _times,
    "paren": _paren,
    "mixed": _mixed,
}

KINDS: tuple[str, ...] = tuple(_WRITERS)
"""From the easiest to the hardest; an example's `level` counts from 1 along it."""

_NEVER_TRAINED = KINDS[-1]
_HELD_OUT_SPLITS = frozenset({"dev", "test"})


def generate(
    split: str,
    *,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    limit: int | None = None,
) -> list[Example]:
    """Examples of one split, the kinds taking turns.

    The same (split, seed, kinds) always gives the same list, and a longer `limit` only extends
    it. `kinds=None` means all five for `dev` and `test` and all but the last elsewhere; asking
    for the last kind by name gives it in any split.
    """
    _check_name("split", split, sorted(SPLITS))
    chosen = default_kinds(split) if kinds is None else tuple(kinds)
    for kind in chosen:
        _check_name("kind", kind, KINDS)
    if not chosen or len(set(chosen)) < len(chosen):
        raise DataError(
            f"kinds must name at least one kind and none twice, not {list(chosen)}; "
            f"allowed: {', '.join(KINDS)}",
            code="invalid_kinds",
            param="kinds",
        )
    if limit is not None and limit < 0:
        raise DataError(
            f"limit must be 0 or more, not {limit}", code="invalid_limit", param="limit"
        )
    size = DEFAULT_LIMIT[split] if limit is None else limit
    return list(islice(_take_turns([_stream(split, seed, kind) for kind in chosen]), size))


def default_kinds(split: str) -> tuple[str, ...]:
    """The kinds a split has unless some are asked for by name."""
    return KINDS if split in _HELD_OUT_SPLITS else KINDS[: KINDS.index(_NEVER_TRAINED)]


def split_of(problem: str) -> str:
    """The one split a problem can belong to, whoever draws it."""
    bucket = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8], "big") % 100
    for split, share in _SHARE.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares of the splits add up to 100")


def _stream(split: str, seed: int, kind: str) -> Iterator[Example]:
    """One kind's problems, without end or repeats, whatever other kinds are drawn beside it."""
    rng = random.Random(f"arithmetic/{split}/{seed}/{kind}")
    level = KINDS.index(kind) + 1
    seen: set[str] = set()
    idle = 0
    while idle < _PATIENCE:
        idle += 1
        draft = _Draft(rng)
        try:
            problem = _WRITERS[kind](draft) + "?"
        except _OutOfRangeError:
            continue
        if problem in seen or split_of(problem) != split:
            continue
        answer = draft.steps[-1].rpartition("=")[2]
        yield Example(
            id=f"arithmetic/{split}/{kind}/{len(seen)}",
            problem=problem,
            answer=answer,
            solution=f"{','.join(draft.steps)}#{answer}",
            kind=kind,
            level=level,
        )
        seen.add(problem)
        idle = 0
    raise DataError(
        f"the {split} split has no more than about {len(seen)} problems of kind {kind}; "
        "ask for fewer",
        code="dataset_exhausted",
        param="limit",
    )


def _take_turns(streams: Sequence[Iterator[Example]]) -> Iterator[Example]:
    while True:
        for stream in streams:
            yield next(stream)


def _check_name(what: str, given: str, allowed: Iterable[str]) -> None:
    names = list(allowed)
    if given in names:
        return
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.0)
    raise DataError(
        f"unknown {what} {given!r}; allowed: {', '.join(names)}; nearest: {near[0]}",
        code=f"unknown_{what}",
        param="kinds" if what == "kind" else what,
    )
