"""A full student over several ranks: its weights, gradients and moments in shards (torch's FSDP2).

Each rank keeps its share of every weight of the student, the shadow and the KL term's reference; a
layer's weights are gathered while it computes. The teacher is an adapter, small, and whole on every
rank: FSDP leaves it alone and its gradient is summed like every adapter's. FSDP sums gradients too,
where by default it averages: the losses are normalised by the whole update already.

A layer's gathering is something all ranks do together, so in training every rank makes as many
passes as every other (`TokenObjectives` adds empty ones). Sampling cannot promise that, its ranks
decode for different numbers of steps: there the weights are gathered first (`whole`), as they are
for what is exported.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from bridge_engine.distributed.ranks import World
from bridge_engine.errors import EngineError
from bridge_engine.forward.logprobs import completion_logprobs

if TYPE_CHECKING:
    from bridge_engine.policy import Policy


def shard(policy: Policy, world: World) -> None:
    """Shares a full student's weights out over the ranks; adapters, and one process, stay as they
    are. To be called when every parameter set is there and no optimiser is.

    Raises EngineError (`unsupported_with_ranks`) where the shadow is to be offloaded.
    """
    if world.size == 1 or not policy.full:
        return
    if policy.student.shadow_offload:
        raise EngineError(
            "student.shadow_offload is for one process: of several, each keeps but its share of "
            "the shadow; leave it out",
            code="unsupported_with_ranks",
            param="student.shadow_offload",
        )
    mesh = init_device_mesh(policy.device.type, (world.size,))
    layers = policy.adapters.layers.values()
    adapters = {p for layer in layers for p in (*layer.A.values(), *layer.B.values())}
    for model in (policy.model, *(twin.model for twin in policy.copies.values())):
        together = set(getattr(model, "_no_split_modules", None) or ())
        blocks = [m for m in model.modules() if type(m).__name__ in together]
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # the one reduction that gloo has too
        model.completion_logprobs = types.MethodType(completion_logprobs, model)
        register_fsdp_forward_method(model, "completion_logprobs")
        with torch.no_grad():  # FSDP takes for the root whatever runs first: let it be the model
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=policy.device))
    policy.sharded = True


@contextmanager
def whole(policy: Policy, *names: str) -> Iterator[None]:
    """Within: every rank has all the weights of the model that these parameter sets run on, and
    forward passes do nothing together. Entered and left by all ranks."""
    with ExitStack() as stack:
        if policy.sharded:
            stack.enter_context(_whole(policy.model_of(*names)))
        yield


@contextmanager
def _whole(model: Any) -> Iterator[None]:
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.set_reshard_after_forward(False)
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
        model.set_reshard_after_forward(True)


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The tensors whole and on the CPU, on the ranks that want to keep them; all ranks call it."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = full.detach().cpu() if isinstance(tensor, DTensor) else full
    return found


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """A whole value as `tensor` is: on its device and, where that is a shard, this rank's of it."""
    value = value.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def is_shard(tensor: Tensor | nn.Parameter) -> bool:
    """Does each rank have a share of it, and not a copy?"""
    return isinstance(tensor, DTensor)


def empty_pass(logprobs_BT: Tensor) -> Tensor:
    """A loss of gradient 0, for a pass that is made only because another rank makes one."""
    return logprobs_BT.sum() * torch.zeros((), device=logprobs_BT.device)
