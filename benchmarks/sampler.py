"""The native sampler beside transformers' `generate`, merged weights beside adapters, in one run.

    python benchmarks/sampler.py --model bridge-tiny --batches 1 8 64 --tokens 64

Each line is the median of interleaved repeats: the same model, prompts, threads and number of new
tokens (EOS is switched off, so that both do the same work). Prints a Markdown table of tokens/s and
ratios to `generate`. `--clock cpu` counts CPU seconds, where the machine does other work too.
"""

import argparse
import statistics
import time
from importlib.metadata import version

import torch

from bridge_engine.policy import Policy
from bridge_engine.rollout import SamplingParams, sample
from bridge_engine.spec.train import LoraSpec, RuntimeSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bridge-tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    now = {"wall": time.perf_counter, "cpu": time.process_time}[options.clock]
    torch.set_num_threads(options.threads)
    runtime = RuntimeSpec(dtype=options.dtype)
    policy = Policy.load(options.model, LoraSpec(), runtime)
    for name in ("student", "teacher"):
        policy.adapters.add(name, seed=0)
    prompt = policy.tokenizer("12+34-5+60-7?")["input_ids"]

    def ours(batch: int, *, merged: bool) -> None:
        with policy.using("student", "teacher", merged=merged):
            sample(
                policy.model,
                [prompt] * batch,
                SamplingParams(options.tokens),
                eos_ids=[],
                pad_id=policy.pad_id,
                generator=torch.Generator().manual_seed(0),
                batch_size=batch,
            )

    def generate(batch: int) -> None:
        with torch.no_grad(), policy.using("student", "teacher", merged=True):
            policy.model.generate(
                torch.tensor([prompt] * batch),
                attention_mask=torch.ones(batch, len(prompt), dtype=torch.long),
                do_sample=True,
                top_k=0,
                max_new_tokens=options.tokens,
                min_new_tokens=options.tokens,
                pad_token_id=policy.pad_id,
            )

    print(
        f"{options.model}, {options.dtype}, {options.threads} thread(s), {options.tokens} tokens, "
    )
    print(f"torch {version('torch')}, transformers {version('transformers')}\n")
    print(
        "| batch | generate, merged (tokens/s) | ours, merged | ours, adapters |\n|---|---|---|---|"
    )
    for batch in options.batches:
        ways = {
            "generate": lambda b=batch: generate(b),
            "merged": lambda b=batch: ours(b, merged=True),
            "adapters": lambda b=batch: ours(b, merged=False),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(options.repeats + 1):
            for name, way in ways.items():
                began = now()
                way()
                if repeat:  # the first round warms up
                    seconds[name].append(now() - began)
        rate = {n: batch * options.tokens / statistics.median(s) for n, s in seconds.items()}
        base = rate["generate"]
        cells = [f"{rate[n]:.0f} ({rate[n] / base:.2f}×)" for n in ("merged", "adapters")]
        print(f"| {batch} | {base:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
