"""The local backend beside transformers' `generate` called once a request, in one run.

    python -m benchmarks.serving --model bridge-tiny --concurrency 1 8 32 --requests 32 --tokens 64

`python -m inference` with one thread is asked over HTTP by so many clients at once, for one adapter
and for eight in turn; `generate` is called in this process, on one thread, through PEFT with one of
the adapters. All sample at temperature 1. The figures are generated tokens a second, the median of
interleaved rounds, and their ratios: other work on the machine hits all three alike.

What the gateway costs in front of a vLLM server is `benchmarks.gateway`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.servers import inference
from bridge_engine.models.folders import materialize_model

ADAPTERS = 8
PROMPTS = [f"{i + 3}+{2 * i + 10}-{i}?" for i in range(32)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="bridge-tiny")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=32, help="a round, of the local backend")
    parser.add_argument("--calls", type=int, default=8, help="a round, of generate")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = materialize_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    base: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as scratch:
        folders = random_adapters(base, Path(scratch), options.rank)
        model = PeftModel.from_pretrained(base, folders[0]).eval()
        with inference() as url:
            for number, folder in enumerate(folders):
                _load(url, f"A@{number}", folder, options.model)
            rates = _measure(url, model, tokenizer, options)
    _print(options, rates)


def random_adapters(base: Any, root: Path, rank: int) -> list[Path]:
    """Random ones, small enough to leave the base's answers their usual length."""
    config = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned: Any = get_peft_model(base, config)
    folders = []
    for seed in range(ADAPTERS):
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, weight in tuned.named_parameters():
                if "lora_" in name:
                    weight.normal_(std=0.01)
        tuned.save_pretrained(root / str(seed))
        folders.append(root / str(seed))
    tuned.unload()
    return folders


def _measure(url: str, model: Any, tokenizer: Any, options: Any) -> dict[str, dict[int, float]]:
    """Tokens a second by way and concurrency."""
    one = ["A@0"] * options.requests
    many = [f"A@{i % ADAPTERS}" for i in range(options.requests)]
    found: dict[str, dict[int, list[float]]] = {"generate": {}, "one": {}, "many": {}}
    for round_number in range(options.rounds + 1):
        rate = _generate(model, tokenizer, options, round_number)
        for count in options.concurrency:
            got = {
                "generate": rate,
                "one": asyncio.run(_ask(url, one, count, options.tokens, round_number)),
                "many": asyncio.run(_ask(url, many, count, options.tokens, round_number)),
            }
            if round_number:  # the first round warms up
                for way, value in got.items():
                    found[way].setdefault(count, []).append(value)
    return {
        way: {count: statistics.median(values) for count, values in by_count.items()}
        for way, by_count in found.items()
    }


def _generate(model: Any, tokenizer: Any, options: Any, seed: int) -> float:
    torch.manual_seed(seed)
    tokens, began = 0, time.perf_counter()
    with torch.inference_mode():
        for call in range(options.calls):
            ids = torch.tensor([tokenizer(PROMPTS[call % len(PROMPTS)])["input_ids"]])
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=options.tokens,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
            tokens += output.shape[1] - ids.shape[1]
    return tokens / (time.perf_counter() - began)


async def _ask(url: str, names: list[str], concurrency: int, tokens: int, seed: int) -> float:
    turns = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as http:

        async def one(number: int, name: str) -> int:
            body = {
                "model": name,
                "prompt": PROMPTS[number % len(PROMPTS)],
                "max_tokens": tokens,
                "temperature": 1.0,
                "seed": 1000 * seed + number,
            }
            async with turns:
                answer = await http.post("/v1/completions", json=body)
            answer.raise_for_status()
            return int(answer.json()["usage"]["completion_tokens"])

        began = time.perf_counter()
        counts = await asyncio.gather(*(one(i, name) for i, name in enumerate(names)))
        return sum(counts) / (time.perf_counter() - began)


def _load(url: str, name: str, folder: Path, base: str) -> None:
    body = {"lora_name": name, "lora_path": str(folder), "base_model": base}
    while True:
        answer = httpx.post(f"{url}/v1/load_lora_adapter", json=body, timeout=600)
        if answer.status_code != 503:  # the base is being loaded
            answer.raise_for_status()
            return


def _print(options: Any, rates: dict[str, dict[int, float]]) -> None:
    print(
        f"{options.model}, float32, 1 thread, at most {options.tokens} tokens an answer, rank "
        f"{options.rank}; torch {version('torch')}, transformers {version('transformers')}, "
        f"peft {version('peft')}\n"
    )
    print("| clients | `generate` per request (tokens/s) | local, one adapter | local, eight |")
    print("|---|---|---|---|")
    for count in options.concurrency:
        base = rates["generate"][count]
        cells = [f"{rates[w][count]:.0f} ({rates[w][count] / base:.1f}×)" for w in ("one", "many")]
        print(f"| {count} | {base:.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
