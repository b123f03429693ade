"""A parameter set of the method (student, teacher, shadow) with an optimiser of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bridge_engine.distributed.sharding import like
from bridge_engine.errors import EngineError, NonFinite
from bridge_engine.spec.train import OptimizerSpec
from bridge_engine.vector import Vector


class ParameterSet:
    """Named trainable tensors that move along gradients they are given."""

    def __init__(
        self, name: str, tensors: Sequence[nn.Parameter], spec: OptimizerSpec, learning_rate: float
    ) -> None:
        self.name = name
        self.tensors = list(tensors)
        self.learning_rate = learning_rate
        self._warmup = spec.warmup_steps
        self._max_norm = spec.max_grad_norm
        self._steps_taken = 0
        self.moves = 0
        """Times that this process has moved it, whatever was restarted."""
        self.optimizer: torch.optim.Optimizer
        if spec.name == "adamw":
            self.optimizer = torch.optim.AdamW(
                self.tensors,
                lr=learning_rate,
                betas=spec.betas,
                weight_decay=spec.weight_decay,
                maximize=True,
                # on a CPU one pass over each tensor instead of eight
                fused=True if self.tensors[0].device.type == "cpu" else None,
            )
        else:
            self.optimizer = torch.optim.SGD(
                self.tensors, lr=learning_rate, weight_decay=spec.weight_decay, maximize=True
            )

    def restart(self) -> None:
        """Forgets the optimiser's moments and its warmup; the parameters stay."""
        self.optimizer.state.clear()
        self._steps_taken = 0

    def ascend(self, gradient: Vector, learning_rate: float | None = None) -> float:
        """One optimiser step up the gradient of an objective; returns its norm before clipping.

        At the set's own learning rate, unless another is given. The gradient is used up.

        Raises NonFinite before anything is changed if the gradient is NaN or Inf, and EngineError
        (`non_finite_parameters`) if the parameters then are: they must not reach a checkpoint.
        """
        norm = gradient.norm()
        if not math.isfinite(norm):
            raise NonFinite(f"the gradient of the {self.name}")
        if self._max_norm is not None and norm > self._max_norm:
            for direction in gradient.tensors:
                direction.mul_(self._max_norm / norm)
        for tensor, direction in zip(self.tensors, gradient.tensors, strict=True):
            tensor.grad = direction
        self._steps_taken += 1
        warm = min(1.0, self._steps_taken / (self._warmup + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = (learning_rate or self.learning_rate) * warm
        self.optimizer.step()
        self.moves += 1
        self.optimizer.zero_grad(set_to_none=True)
        if not all(_is_finite(tensor) for tensor in self.tensors):
            raise EngineError(
                f"the {self.name}'s parameters are not finite after a step; lower "
                "optimizer.student_lr and optimizer.teacher_lr and start again, or go on from the "
                "last checkpoint, which is intact",
                code="non_finite_parameters",
            )
        return norm

    def toward(self, other: ParameterSet, share: float) -> None:
        """Moves to (1 − share) · itself + share · other; at 1 it is the other to the last bit."""
        with torch.no_grad():
            for mine, its in zip(self.tensors, other.tensors, strict=True):
                if share == 1:
                    mine.copy_(its)
                else:
                    mine.lerp_(its.to(mine), share)

    def state(self, *, values: bool = True) -> dict[str, Tensor]:
        """Values and optimiser state as flat named tensors, for a checkpoint. `values=False` for
        a further optimiser of tensors that another set saves."""
        state = {"steps_taken": torch.tensor(self._steps_taken)}
        for index, tensor in enumerate(self.tensors):
            if values:
                state[f"{index}/value"] = tensor.detach()
            for key, value in self.optimizer.state.get(tensor, {}).items():
                if value is not None:
                    state[f"{index}/optimizer/{key}"] = torch.as_tensor(value)
        return state

    def take_values(self, state: dict[str, Tensor]) -> None:
        """Takes the values alone of what another run's `state()` gave; the optimiser is new.

        Raises EngineError (`init_does_not_fit`) where the shapes are others.
        """
        values = {int(k.partition("/")[0]): v for k, v in state.items() if k.endswith("/value")}
        wanted = [tuple(tensor.shape) for tensor in self.tensors]
        given = [tuple(values[index].shape) for index in sorted(values)]
        if wanted != given:
            differ = [
                f"tensor {index} is {its}, not {mine}"
                for index, (mine, its) in enumerate(zip(wanted, given, strict=False))
                if mine != its
            ]
            what = differ[0] if differ else f"{len(given)} tensors for {len(wanted)}"
            raise EngineError(
                f"the {self.name} of the checkpoint to start from is of another shape ({what}); "
                "the model or the adapters are not those it was trained with",
                code="init_does_not_fit",
                param="init",
            )
        with torch.no_grad():
            for index, tensor in enumerate(self.tensors):
                tensor.copy_(like(values[index], tensor))

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state()` gave, to the last bit."""
        self._steps_taken = int(state["steps_taken"])
        with torch.no_grad():
            for index, tensor in enumerate(self.tensors):
                if (value := state.get(f"{index}/value")) is not None:
                    tensor.copy_(like(value, tensor))
                prefix = f"{index}/optimizer/"
                self.optimizer.state[tensor] = {
                    key.removeprefix(prefix): saved.clone()
                    if key.endswith("/step")
                    else like(saved.clone(), tensor)
                    for key, saved in state.items()
                    if key.startswith(prefix)
                }


@torch.no_grad()
def _is_finite(tensor: Tensor) -> bool:
    """Is every number of it? A sum that is finite says so in one pass; one that is not may also be
    of large numbers. Ranks that hold a share each count together, and so agree."""
    return bool(torch.isfinite(tensor.sum())) or bool((~torch.isfinite(tensor)).sum() == 0)
