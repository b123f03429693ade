"""Which datasets there are, what parts they have, and where each part lies. Reads no problem.

Four sources, told apart by the name alone: `arithmetic` is generated; a named benchmark is a file
under BRIDGE_DATA_DIR or, where it is missing, a copy on the Hugging Face hub; `ds_…` is an uploaded
file; `hub:owner/name` is any dataset on the hub. Nothing else is ever opened: a name is an id,
never a path.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from bridge_engine.data import arithmetic, hub
from bridge_engine.errors import DataError
from bridge_engine.spec.errors import nearest_name

Role = Literal["prompts", "demos", "eval"]
Source = Literal["generated", "file", "upload", "hub"]
Row = Mapping[str, Any]

ARITHMETIC = "arithmetic"
UPLOADED = re.compile(r"ds_[A-Za-z0-9_-]{1,64}")
ON_HUB = re.compile(r"hub:([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)", re.ASCII)
TENTH, REST = "test10", "train90"
"""Of an upload: a tenth of its problems to be measured on, and the others."""
UPLOAD_SUFFIXES = (".jsonl", ".parquet", ".jsonl.gz")


@dataclass(frozen=True)
class Part:
    """One split of a named benchmark."""

    file: str
    """Name under BRIDGE_DATA_DIR."""
    keep: Callable[[Row], bool] | None = None
    """Which rows of the file belong to the split; None for all."""
    hub: tuple[str, str] | None = None
    """(owner/name, split) of a copy on the hub; None where there is none with the same rows."""
    rows: int | None = None
    """How many problems it has, where that is worth knowing before it is read."""


@dataclass(frozen=True)
class Benchmark:
    """A dataset known by name."""

    parts: Mapping[str, Part]
    has_solutions: bool
    """Every row has a worked solution, good enough to imitate."""
    defaults: Mapping[Role, str]
    kinds: tuple[str, ...] | None = None
    overlaps: tuple[frozenset[str], ...] = ()
    """Pairs of splits that share problems."""


@dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset without reading its problems."""

    name: str
    source: Source
    splits: tuple[str, ...]
    has_solutions: bool | None
    """None: not known before it is read (hub)."""
    default_splits: Mapping[Role, str] = field(default_factory=dict)
    """The split meant when none is named; a role that is missing has to name one."""
    kinds: tuple[str, ...] | None = None
    """None: any name is accepted, as the file's own `kind` column decides."""
    overlaps: tuple[frozenset[str], ...] = ()

    def share_problems(self, one: str, other: str) -> bool:
        """Can one problem be in both splits?"""
        return one == other or frozenset({one, other}) in self.overlaps


_MATH_SUBJECTS = (
    "Algebra",
    "Counting & Probability",
    "Geometry",
    "Intermediate Algebra",
    "Number Theory",
    "Prealgebra",
    "Precalculus",
)


def _math_dev(row: Row) -> bool:
    """The 367 hard problems that MATH 8k leaves out: a held-out set matched to MATH500."""
    return (row["level"] or 0) >= 3 and not row["in_math8k"]


def _math_train(row: Row) -> bool:
    return not _math_dev(row)


def _math_train_hard(row: Row) -> bool:
    """The 8,523 problems of levels 3 to 5 that SimpleRL-style work trains on."""
    return bool(row["in_math8k"])


def _test_only(
    name: str,
    rows: int,
    *,
    has_solutions: bool,
    hub_copy: tuple[str, str] | None = None,
    kinds: tuple[str, ...] | None = None,
) -> Benchmark:
    part = Part(f"{name}.jsonl", hub=hub_copy, rows=rows)
    return Benchmark({"test": part}, has_solutions, {"eval": "test"}, kinds)


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "gsm8k": Benchmark(
            {
                "train": Part("gsm8k_train.jsonl.gz", hub=("openai/gsm8k", "main/train")),
                "test": Part("gsm8k_test.jsonl", hub=("openai/gsm8k", "main/test"), rows=1319),
            },
            has_solutions=True,
            defaults={"prompts": "train", "demos": "train", "eval": "test"},
        ),
        # Trained on, `train` would contain `dev` if it were the whole file.
        "math": Benchmark(
            {
                "train": Part("math_train.jsonl.gz", _math_train),
                "train_hard": Part("math_train.jsonl.gz", _math_train_hard),
                "dev": Part("math_train.jsonl.gz", _math_dev),
            },
            has_solutions=True,
            defaults={"prompts": "train", "demos": "train", "eval": "dev"},
            kinds=_MATH_SUBJECTS,
            overlaps=(frozenset({"train", "train_hard"}),),
        ),
        "math500": _test_only(
            "math500",
            500,
            has_solutions=True,
            hub_copy=("HuggingFaceH4/MATH-500", "test"),
            kinds=_MATH_SUBJECTS,
        ),
        "minerva_math": _test_only("minerva_math", 272, has_solutions=True),
        "olympiadbench": _test_only(
            "olympiadbench",
            675,
            has_solutions=True,
            kinds=("Algebra", "Combinatorics", "Geometry", "Number Theory"),
        ),
        "aime24": _test_only(
            "aime24", 30, has_solutions=True, hub_copy=("HuggingFaceH4/aime_2024", "train")
        ),
        "amc23": _test_only("amc23", 40, has_solutions=False),
        # SVAMP's "solution" is an equation such as `( 76.0 - 25.0 )`: nothing to imitate.
        "svamp": _test_only("svamp", 1000, has_solutions=False),
        "multiarith": _test_only("multiarith", 600, has_solutions=False),
        "singleeq": _test_only("singleeq", 508, has_solutions=False),
    }
)


def names() -> list[str]:
    """Every dataset that has a name of its own."""
    return sorted([ARITHMETIC, *BENCHMARKS])


def data_dir() -> Path | None:
    """Where benchmark files lie (BRIDGE_DATA_DIR), if anywhere."""
    value = os.environ.get("BRIDGE_DATA_DIR")
    return Path(value) if value else None


def uploads_dir() -> Path:
    """Where uploaded datasets lie: BRIDGE_UPLOADS_DIR, or `datasets` under BRIDGE_HOME."""
    value = os.environ.get("BRIDGE_UPLOADS_DIR")
    return Path(value) if value else Path(os.environ.get("BRIDGE_HOME", ".bridge")) / "datasets"


def uploaded_file(name: str) -> Path:
    """The file behind `ds_…`."""
    if UPLOADED.fullmatch(name):
        for suffix in UPLOAD_SUFFIXES:
            path = uploads_dir() / f"{name}{suffix}"
            if path.is_file():
                return path
    raise DataError(
        f"there is no uploaded dataset {name!r}; upload it with POST /datasets and use the id "
        "that is answered",
        code="unknown_dataset",
        param="name",
    )


def in_split(problem: str, split: str) -> bool:
    """Is a problem of an upload in this split of it? By its text alone, blanks aside: whatever else
    is uploaded with it, and however often, it is in the same one."""
    if split == "train":
        return True
    text = " ".join(problem.split()).encode()
    tenth = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) % 10 == 0
    return tenth == (split == TENTH)


def benchmark_file(name: str, split: str) -> Path | None:
    """A benchmark's file under BRIDGE_DATA_DIR, or None where it is not there."""
    folder = data_dir()
    path = folder / BENCHMARKS[name].parts[split].file if folder else None
    return path if path is not None and path.is_file() else None


def info(name: str) -> DatasetInfo:
    """What is known of the dataset called `name`; DataError (with a code) where nothing is."""
    if name == ARITHMETIC:
        return DatasetInfo(
            name,
            "generated",
            tuple(sorted(arithmetic.SPLITS)),
            has_solutions=True,
            default_splits={"prompts": "train", "demos": "demos", "eval": "dev"},
            kinds=tuple(arithmetic.KINDS),
        )
    if name in BENCHMARKS:
        known = BENCHMARKS[name]
        return DatasetInfo(
            name,
            "file",
            tuple(known.parts),
            known.has_solutions,
            known.defaults,
            known.kinds,
            known.overlaps,
        )
    if name.startswith("ds_"):
        uploaded_file(name)
        everywhere: dict[Role, str] = {"prompts": "train", "demos": "train", "eval": "train"}
        overlaps = (frozenset({"train", REST}), frozenset({"train", TENTH}))
        parts = ("train", REST, TENTH)
        return DatasetInfo(name, "upload", parts, None, everywhere, overlaps=overlaps)
    if on_hub := ON_HUB.fullmatch(name):
        splits = tuple(hub.splits(hub.list_files(on_hub[1])))
        return DatasetInfo(name, "hub", splits, None, _usual_splits(splits))
    raise unknown(name)


def unknown(name: str) -> DataError:
    """The error for a name that nothing is known by."""
    near = nearest_name(name, names())
    hint = f"; did you mean {near!r}?" if near else ""
    return DataError(
        f"{name!r} is not a known dataset{hint} (known: {', '.join(names())}; an uploaded dataset "
        "is ds_…, one on the Hugging Face hub is hub:owner/name)",
        code="unknown_dataset",
        param="name",
    )


def rows(name: str, split: str) -> int | None:
    """How many problems a split has, where that is known without reading it."""
    known = BENCHMARKS.get(name)
    return known.parts[split].rows if known and split in known.parts else None


def check_available(name: str, split: str) -> None:
    """DataError unless a benchmark's split can be read from somewhere."""
    if name not in BENCHMARKS or benchmark_file(name, split) is not None:
        return
    part = BENCHMARKS[name].parts[split]
    if part.hub is not None:
        try:
            hub.list_files(part.hub[0])
            return
        except DataError:
            pass
    folder = data_dir()
    missing = f"{folder / part.file} does not exist" if folder else "BRIDGE_DATA_DIR is not set"
    elsewhere = (
        f" and its copy on the Hugging Face hub ({part.hub[0]}) cannot be reached"
        if part.hub
        else " and there is no copy of the same rows on the Hugging Face hub"
    )
    raise DataError(
        f"{name}/{split} is not on this machine: {missing}{elsewhere}; set BRIDGE_DATA_DIR to a "
        f"folder that holds {part.file}",
        code="dataset_unavailable",
        param="name",
    )


def _usual_splits(splits: tuple[str, ...]) -> dict[Role, str]:
    """The splits of a hub dataset that suit a role by their names."""

    def first(*wanted: str) -> str | None:
        for word in wanted:
            exact = [s for s in splits if s == word] or [
                s for s in splits if s.endswith(f"/{word}")
            ]
            if len(exact) == 1:
                return exact[0]
        return None

    chosen: dict[Role, str | None] = {
        "prompts": first("train"),
        "demos": first("train"),
        "eval": first("dev", "validation", "test"),
    }
    return {role: split for role, split in chosen.items() if split is not None}
