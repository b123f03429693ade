"""A gradient as one thing: whole parameter sets are added and scaled, as the paper writes it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Vector:
    """A list of tensors with the arithmetic of a vector space. They stay as they are until a step
    uses them up."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self._norm: float | None = None

    def __add__(self, other: Vector) -> Vector:
        return Vector(a + b for a, b in zip(self.tensors, other.tensors, strict=True))

    def __sub__(self, other: Vector) -> Vector:
        return Vector(a - b for a, b in zip(self.tensors, other.tensors, strict=True))

    def __rmul__(self, factor: float) -> Vector:
        return Vector(factor * a for a in self.tensors)

    def norm(self) -> float:
        """Euclidean norm over all tensors together."""
        if self._norm is None:
            norms = [t.norm() for t in self.tensors]
            self._norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
        return self._norm
