"""For torchrun: resumes every method bitwise, by all ranks together. FOLDER is the argument."""

import sys
from pathlib import Path

import torch

from bridge_engine.distributed.ranks import join, leave
from bridge_engine.methods import METHODS
from tests.support.resume import assert_resumes_bitwise

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    with join() as world:
        assert world.size == 2
        for method in METHODS:
            interruptions = (("stopped", 1), ("killed", 3))
            assert_resumes_bitwise(Path(sys.argv[1]) / method, method, interruptions, world)
            if world.is_first:
                print(method, flush=True)
    leave(0)
