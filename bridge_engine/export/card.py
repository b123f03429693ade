"""What is worth knowing of an export beside its weights; lies beside them as `bridge.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

CARD = "bridge.json"


@dataclass(frozen=True)
class AdapterCard:
    """Of an adapter, or of a merged model."""

    base_model: str
    method: str
    step: int
    rank: int
    template: dict[str, Any]
    """How a problem becomes a prompt (`TemplateSpec`, with `auto` decided)."""
    max_new_tokens: int
    """Longest answer in training."""
    eval_max_new_tokens: int | None = None
    """Longest answer in the evaluations of its training; None: that of training."""
    accuracy: float | None = None
    """Held-out accuracy of what this is, at this step, in 0…1, where it was measured."""
    deployment: Literal["policy", "student"] = "policy"
    """`policy` is θ with its teacher, `student` is θ alone; without a teacher they are the same."""
    form: Literal["adapter", "svd", "merged"] = "adapter"
    """`adapter` is exact, `svd` the best adapter of its rank, `merged` a whole model."""
    relative_error: float | None = None
    """Of `svd`: ‖what training changed − what this holds‖ / ‖what training changed‖, Frobenius,
    over all weights, those that no adapter can hold (embeddings, norms) included."""
    canary: dict[str, Any] | None = None
    """`tokens` of a fixed text, their `logprobs` (natural, from the second token on) under what
    this holds, and the `dtype` to expect them in. Whoever serves it compares."""
    end_tokens: list[int] | None = None
    """Ids at which sampling stopped: a base's own files may not name its template's end."""
    data: dict[str, Any] | None = None
    """What it was trained on: `prompts` and `demos` as the resolved spec has them (`DatasetRef`),
    where the method learns from them."""
    error_outside: float | None = None
    """Of `svd`: share of that error's square, in 0…1, that is in embeddings, norms, biases and the
    head; a higher rank cannot lessen it."""

    def write(self, folder: Path) -> None:
        """Puts it beside the weights."""
        (folder / CARD).write_text(json.dumps(asdict(self), indent=1))
