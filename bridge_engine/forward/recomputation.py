"""Gradient checkpointing: a block's activations are computed again instead of being kept.

transformers' blocks do it by torch.utils.checkpoint, but only while their `training` is set, and
ours are in eval mode for good, since nothing random belongs in a policy. So a training pass sets it
on the blocks alone: what is inside them, dropout and attention, stays in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from bridge_engine.errors import EngineError


def enable(model: Any) -> None:
    """From now on training passes of this model keep the input of each block and no more.

    The backward pass runs the blocks again, with whatever adapters are active *then*.
    EngineError (`no_gradient_checkpointing`) if the model's architecture cannot.
    """
    if not model.supports_gradient_checkpointing or not _blocks(model):
        raise EngineError(
            f"{type(model).__name__} has no gradient checkpointing; set "
            "runtime.gradient_checkpointing to false and lower runtime.micro_batch instead",
            code="no_gradient_checkpointing",
            param="runtime.gradient_checkpointing",
        )
    # nothing random is computed, so there is no state of random generators to carry along
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    # only reentrant checkpointing needs inputs with a gradient; here they would cost a backward
    # pass through layers below the first adapter
    model.disable_input_require_grads()


@contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """Around a forward pass: its blocks are checkpointed if that is enabled and gradients are
    wanted. Without gradients, as in sampling, nothing is different."""
    blocks = [b for b in _blocks(model) if b.gradient_checkpointing]
    if not (blocks and torch.is_grad_enabled()):
        yield
        return
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False


def _blocks(model: Any) -> list[GradientCheckpointingLayer]:
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
