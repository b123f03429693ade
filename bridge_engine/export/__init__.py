"""What a run leaves for others to load: adapters, merged models, and a card with each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bridge_engine.export.adapter import export_adapter, exported_rank
from bridge_engine.export.canary import canary
from bridge_engine.export.card import AdapterCard
from bridge_engine.export.merged import export_merged
from bridge_engine.export.svd import export_svd
from bridge_engine.policy import Policy
from bridge_engine.spec.train import TrainSpec
from bridge_engine.state.checkpoint import MANIFEST, sha256_of, step_folder

STUDENT_SUFFIX = "-student"
"""Of the folder of what is the student alone."""


@dataclass(frozen=True)
class Exports:
    """What was written at a step; folders relative to the run directory."""

    adapter: str | None = None
    """The policy as an adapter; None for a full student without `export.svd_rank`."""
    sha256: str | None = None
    rank: int | None = None
    relative_error: float | None = None
    student: str | None = None
    """The student alone as an adapter, for methods with a teacher."""
    student_sha256: str | None = None
    student_rank: int | None = None
    merged: str | None = None
    """The policy as a whole model, at the last and at the best step."""
    merged_sha256: str | None = None
    """Of its manifest, which has the hash of each file."""
    merged_student: str | None = None
    """The student alone as a whole model, where it was trained as one."""
    merged_student_sha256: str | None = None


def write_exports(
    policy: Policy,
    spec: TrainSpec,
    root: Path,
    card: AdapterCard,
    *,
    student_accuracy: float | None = None,
    whole_model: bool,
) -> Exports:
    """Writes what the spec asks for at `card.step`; a step's files that are there stay as they are.

    `whole_model`: is this the last step, or the best so far?
    """
    names = spec.method.policy
    folder = step_folder(card.step)
    rank = spec.export.svd_rank if policy.full else exported_rank(policy.adapters, names)
    found = Exports(rank=rank)
    if rank is not None:
        place = f"adapters/{folder}"
        sha256, error = _adapter(policy, names, root / place, replace(card, rank=rank))
        found = replace(found, adapter=place, sha256=sha256, relative_error=error)
    if rank is not None and names != ("student",) and spec.export.student_alone:
        place = f"adapters/{folder}{STUDENT_SUFFIX}"
        alone = replace(
            card,
            rank=rank if policy.full else exported_rank(policy.adapters, ("student",)),
            accuracy=student_accuracy,
            deployment="student",
        )
        sha256, _ = _adapter(policy, ("student",), root / place, alone)
        found = replace(found, student=place, student_sha256=sha256, student_rank=alone.rank)
    if whole_model and (policy.full or spec.export.merged):
        place = f"models/{folder}"
        whole = replace(card, rank=0, form="merged")
        sha256 = _merged(policy, names, root / place, whole)
        found = replace(found, merged=place, merged_sha256=sha256)
        if policy.full and names != ("student",) and spec.export.student_alone:
            place += STUDENT_SUFFIX
            alone = replace(whole, accuracy=student_accuracy, deployment="student")
            sha256 = _merged(policy, ("student",), root / place, alone)
            found = replace(found, merged_student=place, merged_student_sha256=sha256)
    return found


def _merged(policy: Policy, names: tuple[str, ...], folder: Path, card: AdapterCard) -> str:
    dtype = policy.compute_dtype or policy.model.dtype
    figures = canary(policy, names)
    if figures is not None:
        figures["dtype"] = str(dtype).removeprefix("torch.")  # what its weights are rounded to
    export_merged(policy, names, folder, replace(card, canary=figures), dtype)
    return sha256_of(folder / MANIFEST)


def _adapter(
    policy: Policy, names: tuple[str, ...], folder: Path, card: AdapterCard
) -> tuple[str, float | None]:
    if policy.full:
        return export_svd(policy, names, folder, card)
    card = replace(card, canary=canary(policy, names))
    return export_adapter(policy.adapters, names, folder, card), None


__all__ = ["AdapterCard", "Exports", "export_adapter", "exported_rank", "write_exports"]
