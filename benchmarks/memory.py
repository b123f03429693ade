"""Peak memory of one RL pass over a micro-batch, the naive way and ours, a process for each.

    python benchmarks/memory.py
    python benchmarks/memory.py --model bridge-tiny --sequences 8 --prompt 24 --completion 40
    python benchmarks/memory.py --device cuda --dtype bfloat16 --sequences 64 --completion 512

`naive` is what a forward pass of transformers gives: logits of every token, prompts and padding
included, log_softmax over all of them, then the completions' tokens picked out. `ours` is
`completion_logprobs`. Half the completions are half as long as the others. `extra` is what the pass
needs beyond the loaded model: on a CPU the process's peak RSS less its RSS before, on a GPU
torch.cuda.max_memory_allocated less what was allocated. `grad` is the norm of the adapters'
gradient, the same in every line. One line a variant, as Markdown.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial

VARIANTS = {
    "naive": {},
    "naive, gradient checkpointing": {"recompute": True},
    "ours, logits at once": {"chunks": False},
    "ours": {},
    "ours, packed": {"packed": True},
    "ours, gradient checkpointing": {"recompute": True},
    "ours, packed, gradient checkpointing": {"packed": True, "recompute": True},
    "full student, ours, logits at once": {"full": True, "chunks": False},
    "full student, ours": {"full": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--completion", type=int, default=128, help="tokens of the longer half")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options)))
        return
    print("| variant | extra (MB) | seconds | grad |\n|---|---|---|---|")
    # large blocks come from the system and go back to it, so that RSS follows what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
    for variant in options.variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", variant]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"| {variant} | {found['bytes'] / 1e6:.0f} | {found['seconds']:.1f} | "
            f"{found['grad']:.6g} |",
            flush=True,
        )


def measure(options: argparse.Namespace) -> dict:
    """One pass, forward and backward, in this process: {bytes, seconds, grad}."""
    import torch

    from bridge_engine.forward import logprobs
    from bridge_engine.forward.sequences import TokenSequence, pack, pad
    from bridge_engine.policy import Policy
    from bridge_engine.spec.train import LoraSpec, RuntimeSpec, StudentSpec

    variant = {"chunks": True, "packed": False, "recompute": False, "full": False}
    variant |= VARIANTS[options.one]
    runtime = RuntimeSpec(
        device=options.device,
        dtype=options.dtype,
        attention=options.attention,
        gradient_checkpointing=variant["recompute"],
        padding_free=variant["packed"],
    )
    student = StudentSpec(form="full" if variant["full"] else "lora")
    policy = Policy.load(options.model, LoraSpec(), runtime, student)
    policy.add("student", 0)
    rng = torch.Generator().manual_seed(0)
    vocabulary = policy.model.config.vocab_size
    sequences = []
    for i in range(options.sequences):
        length = options.prompt + options.completion // (1 + i % 2)
        tokens = torch.randint(vocabulary, (length,), generator=rng).tolist()
        sequences.append(TokenSequence(tokens[: options.prompt], tokens[options.prompt :]))
    if variant["packed"]:
        batch = pack(sequences, device=policy.device)
    else:
        batch = pad(sequences, pad_id=policy.pad_id, device=policy.device)
    if not variant["chunks"]:
        logprobs.LOGITS_AT_ONCE = 1 << 60
    advantages = torch.randn(options.sequences, generator=rng).to(policy.device)
    find = partial(_naive, policy) if options.one.startswith("naive") else policy.logprobs

    before = _in_use(options.device)
    began = time.perf_counter()
    with policy.using("student"):
        found = find(batch)
        loss = -(found[0] * batch.mask_BT * advantages.unsqueeze(1)).sum() / batch.mask_BT.sum()
        loss.backward()
    grad = torch.stack([p.grad.norm() for p in policy.parameters("student") if p.grad is not None])
    return {
        "grad": grad.norm().item(),
        "seconds": time.perf_counter() - began,
        "bytes": _peak(options.device) - before,
    }


def _naive(policy, batch):
    """(logprobs_BT,) from the logits of every token."""
    import torch

    from bridge_engine.forward.recomputation import recomputing

    with recomputing(policy.module):
        logits_BLV = policy.module(input_ids=batch.tokens_RL, use_cache=False).logits
    logprobs_BLV = torch.log_softmax(logits_BLV.float(), dim=-1)
    first = batch.firsts_B[0]  # every prompt is as long
    logprobs_BTV = logprobs_BLV[:, first : first + batch.mask_BT.shape[1]]
    targets_BT = torch.zeros_like(batch.mask_BT, dtype=torch.long)
    targets_BT.masked_scatter_(batch.mask_BT.bool(), batch.targets_N)
    return (logprobs_BTV.gather(2, targets_BT.unsqueeze(2)).squeeze(2) * batch.mask_BT,)


def _in_use(device: str) -> int:
    """Bytes now; from here on `_peak` counts."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with open("/proc/self/clear_refs", "w") as file:  # peak RSS is now RSS
        file.write("5")
    return _status("VmRSS")


def _peak(device: str) -> int:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
