"""For torchrun: the second of two ranks holds the share of a student that is not finite after a
step; both say how they took it."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from bridge_engine.distributed.ranks import join, leave
from bridge_engine.errors import EngineError
from bridge_engine.parameters import ParameterSet
from bridge_engine.spec.train import OptimizerSpec
from bridge_engine.vector import Vector

if __name__ == "__main__":
    with join() as world:
        mesh = init_device_mesh("cpu", (2,))

        def shared(tensor):
            return distribute_tensor(tensor, mesh, [Shard(0)])

        spec = OptimizerSpec(name="sgd", max_grad_norm=None)
        student = ParameterSet(
            "student", [torch.nn.Parameter(shared(torch.zeros(4, 3)))], spec, 3e38
        )
        gradient = torch.zeros(4, 3)
        gradient[3, 0] = 2.0
        try:
            student.ascend(Vector([shared(gradient)]))
            print(f"rank {world.rank} went on", flush=True)
        except EngineError as error:
            print(f"rank {world.rank}: {error.code}", flush=True)
    leave(0)
