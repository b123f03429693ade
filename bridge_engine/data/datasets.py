r"""Problems by name: what a spec's `data` entries stand for, as lists of examples.

One loader for every source (see `bridge_engine.data.registry`). An expert's solution always ends by
stating the answer in a form that the verifier reads; where the source's text does not (GSM8K,
OlympiadBench), `The answer is \boxed{72}.` is its last line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

from bridge_engine.data import arithmetic, hub, registry
from bridge_engine.data.example import Example
from bridge_engine.data.registry import Role
from bridge_engine.data.rows import FileSummary, numbered_rows, read_rows, summarize
from bridge_engine.errors import DataError
from bridge_engine.spec.train import DatasetRef

__all__ = ["FileSummary", "digest", "first_row", "load", "read_rows", "summarize"]

MOST_TEXT = 2_000_000_000
"""Characters of all the examples of one role. More is refused with advice, before the memory of the
machine runs out without any."""

_Keep = Callable[[dict[str, Any]], bool]


def load(ref: DatasetRef, role: Role, field: str | None = None) -> list[Example]:
    """The examples a spec's `data.<role>` (or another `field`) stands for, in the dataset's fixed
    order.

    Reads no further than `ref.limit` needs. With role `demos` every example has a solution.
    DataError names the field, the file and the line at fault.
    """
    try:
        return _load(ref, role)
    except DataError as error:
        field = field or f"data.{role}"
        where = f"{field}.{error.param}" if error.param else field
        raise DataError(error.message, code=error.code, param=where) from error


def digest(examples: Iterable[Example]) -> str:
    """SHA-256 of a set of problems as it was loaded."""
    found = hashlib.sha256()
    for example in examples:
        *fields, value = astuple(example)
        # the hashes in older checkpoints know no measured values
        found.update(repr((*fields, value) if value is not None else tuple(fields)).encode())
    return found.hexdigest()


def too_few(name: str, split: str) -> str:
    """Why a split of an upload is empty."""
    return (
        f"{name} has so few problems that none is in {split}, by its text; upload more, or a file "
        "of its own to measure on"
    )


def first_row(path: Path) -> Example:
    """The first problem of a file."""
    return next(read_rows(path))


def _load(ref: DatasetRef, role: Role) -> list[Example]:
    info = registry.info(ref.name)
    split = ref.split or info.default_splits.get(role)
    if split is None or split not in info.splits:
        raise DataError(
            f"{ref.name} has no split {split!r}; it has {', '.join(info.splits)}"
            if split
            else f"name a split of {ref.name}: {', '.join(info.splits)}",
            code="unknown_split",
            param="split",
        )
    if info.source == "generated":
        return arithmetic.generate(split, seed=ref.seed, kinds=ref.kinds, limit=ref.limit)
    chosen: list[Example] = []
    kinds_seen: set[str] = set()
    size = 0
    for where, example in _examples(ref.name, split):
        if ref.kinds is not None and example.kind not in ref.kinds:
            kinds_seen.add(str(example.kind))
            continue
        if role == "demos" and example.solution is None:
            raise DataError(
                f"{where} has no solution, so there is nothing to imitate; give every row a "
                "`solution`, or use the dataset for prompts or eval only",
                code="no_solutions",
            )
        size += len(example.problem) + len(example.solution or "")
        if size > MOST_TEXT:
            raise DataError(
                f"{ref.name}/{split} has more text than is held in memory at once "
                f"({MOST_TEXT:.0e} characters); set `limit` to below {len(chosen)}",
                code="dataset_too_large",
                param="limit",
            )
        chosen.append(example)
        if ref.limit is not None and len(chosen) >= ref.limit:
            break
    if not chosen and not kinds_seen:
        raise DataError(too_few(ref.name, split), code="no_data", param="split")
    if not chosen:
        found = ", ".join(sorted(kinds_seen)[:20])
        raise DataError(
            f"{ref.name}/{split} has no problem of kind {', '.join(ref.kinds or [])}; "
            f"its kinds: {found}",
            code="unknown_kind",
            param="kinds",
        )
    return chosen


def _examples(name: str, split: str) -> Iterator[tuple[str, Example]]:
    """(where it stands, example) of every row of a split that is a file."""
    if name in registry.BENCHMARKS:
        part = registry.BENCHMARKS[name].parts[split]
        file = registry.benchmark_file(name, split)
        if file is not None:
            yield from _from_files([(file, file.name)], part.keep)
            return
        registry.check_available(name, split)
        if part.hub is not None:
            yield from _from_files(_hub_files(*part.hub), None)
    elif on_hub := registry.ON_HUB.fullmatch(name):
        yield from _from_files(_hub_files(on_hub[1], split), None)
    else:
        path = registry.uploaded_file(name)
        for where, example in _from_files([(path, path.name)], None):
            if registry.in_split(example.problem, split):
                yield where, example


def _hub_files(repo: str, split: str) -> Iterator[tuple[Path, str]]:
    """The files of a split on the hub, each downloaded when it is needed."""
    files = hub.splits(hub.list_files(repo)).get(split)
    if not files:
        raise DataError(
            f"{repo} has no split {split!r} on the Hugging Face hub", code="unknown_split"
        )
    for file in files:
        yield hub.fetch(repo, file), f"{repo}/{file}"


def _from_files(
    files: Iterable[tuple[Path, str]], keep: _Keep | None
) -> Iterator[tuple[str, Example]]:
    for path, shown in files:
        for number, row, example in numbered_rows(path, name=shown):
            if keep is None or keep(row):
                yield f"{shown}, line {number}", example
