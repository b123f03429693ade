"""Make bridge-tiny: a base model of 0.8 M parameters that learns by SFT and RL in minutes.

    python benchmarks/pretrain_tiny.py --out bridge_engine/assets/bridge-tiny

A base model worth training further has the skill and lacks the habit. So it is made in two parts:

1. **Skill.** Worked solutions, a quarter of all sequences a plain copying task (`3+*7:3+*7`,
   without which the circuit that looks up the next operand forms late or never). The style is a
   pupil's run-on, `12+3=15-5=10#10`, where the expert of `bridge_engine.data.arithmetic` writes
   `12+3=15,15-5=10#10`: the base has to learn something from the demonstrations.
2. **Habit.** A short last phase of mostly bare answers (`#10`), worked solutions the rarer the
   harder the kind. What a model saw last is what it does first: it guesses, mostly wrongly, and
   now and then it works a problem out, which is what RL can find and strengthen.

Simplified, and why: sequences are never packed, because in use a prompt starts at position 0 and
so it must here; only the completion carries loss, since the digits of a random problem are noise;
learning rates are constants of this page. Both measured tables belong in the model card, which is
written by hand. On one machine and one thread, a seed gives the same weights again.
"""

import argparse
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bridge_engine.data import arithmetic
from bridge_engine.data.example import Example

CONTEXT = 256
MAX_NEW_TOKENS = 64

SKILL_RATE, SKILL_FLOOR, SKILL_BATCH = 3e-3, 1e-4, 48
HABIT_RATE, HABIT_BATCH = 5e-4, 48
COPYING = 0.25
PRACTICE = 0.35
"""The shares of the copying task and of sums of any shape in the skill phase; the rest are the
four trained kinds."""

EXPERT = 0.3
"""Of the trained kinds' solutions, the share in the expert's style. With none, 128 demonstrations
are far too few to learn it from; with all, they would have nothing to teach."""

WORKED = {"add3": 0.5, "add5": 0.12, "times": 0.12, "paren": 0.06}
"""The share of worked solutions in the habit phase; the rest are bare answers."""

Pair = tuple[str, str]
"""A prompt and the completion that carries the loss."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and no merges: in ASCII one a character, and any text round-trips."""
    specials = ["<pad>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        # Never produced, but AutoTokenizer loads this as a Qwen2Tokenizer, and that adds an
        # unknown token beyond the model's vocabulary when none is named.
        unk_token="<pad>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    # The usual 0.02 leaves tied embeddings too small to tell tokens apart: learning stalls.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def run_on(solution: str) -> str:
    """The base's own style: a step that starts from the last result does not repeat it."""
    return re.sub(r"=(\d+),\1(?=[-+*])", r"=\1", solution)


def practice(rng: random.Random) -> Pair:
    """A sum of two to five items, up to two of them products or up to two of them parentheses.

    A model that only ever sees the four trained kinds learns four templates and fails at any
    other shape. Variety makes it learn the parts. A product and a parenthesis never meet here:
    putting them together is what the fifth kind tests.
    """
    while True:
        special = rng.choice("*(")
        count = rng.choices((0, 1, 2), (3, 4, 3))[0]
        items = rng.randint(2, 4 if count == 2 else 5)
        where = set(rng.sample(range(items), count))
        text, results, steps = "", [], []
        for index in range(items):
            sign = rng.choice("+-") if index else ""
            number = rng.randint(1, 49)
            if index not in where:
                text += f"{sign}{number}"
            elif special == "*":
                left, right = rng.randint(2, 9), rng.randint(2, 9)
                number = left * right
                text += f"{sign}{left}*{right}"
                steps.append((f"{left}*{right}", number))
            else:
                left, inner, right = number, rng.choice("+-"), rng.randint(1, 49)
                number = left + right if inner == "+" else left - right
                text += f"{sign}({left}{inner}{right})"
                steps.append((f"{left}{inner}{right}", number))
            results.append((sign, number))
        total = results[0][1]
        for sign, number in results[1:]:
            before, total = total, total + number if sign == "+" else total - number
            steps.append((f"{before}{sign}{number}", total))
        in_range = all(0 <= result <= arithmetic.LARGEST for _, result in steps)
        if in_range and arithmetic.split_of(f"{text}?") == "pretrain":
            worked = ",".join(f"{step}={result}" for step, result in steps)
            return f"{text}?", run_on(f"{worked}#{total}")


def copying(rng: random.Random) -> Pair:
    text = "".join(rng.choices("0123456789+-*()=,", k=rng.randint(3, 24)))
    return f"{text}:", text


def skill_pairs(examples: list[Example], rng: random.Random) -> Iterator[Pair]:
    while True:
        draw = rng.random()
        if draw < COPYING:
            yield copying(rng)
        elif draw < COPYING + PRACTICE:
            yield practice(rng)
        else:
            example = rng.choice(examples)
            own = rng.random() >= EXPERT
            yield example.problem, run_on(str(example.solution)) if own else str(example.solution)


def habit_pairs(examples: list[Example], rng: random.Random) -> Iterator[Pair]:
    while True:
        example = rng.choice(examples)
        worked = rng.random() < WORKED[str(example.kind)]
        yield (
            example.problem,
            run_on(str(example.solution)) if worked else f"#{example.answer}",
        )


def batch_of(
    pairs: Iterator[Pair], size: int, tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, padded on the right so that every prompt starts at position 0."""
    rows, labels = [], []
    for _ in range(size):
        prompt, completion = next(pairs)
        prompt_ids = tokenizer.encode(prompt)
        completion_ids = [*tokenizer.encode(completion), tokenizer.eos_token_id]
        rows.append([*prompt_ids, *completion_ids])
        labels.append([-100] * len(prompt_ids) + completion_ids)
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    labels_BT = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    return ids_BT, labels_BT


def train(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Iterator[Pair],
    *,
    name: str,
    steps: int,
    batch: int,
    rate: Callable[[int], float],
    save_to: Path | None = None,
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    started = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        ids_BT, labels_BT = batch_of(pairs, batch, tokenizer)
        # No attention mask: padding is on the right, where a causal model never looks.
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.perf_counter() - started
            print(f"{name} {step + 1:5d}/{steps} loss {loss.item():.3f} {seconds:.0f}s", flush=True)
        if save_to is not None and (step + 1) % 250 == 0:
            save(model, tokenizer, save_to)


def save(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a proportion; unlike the normal one it stays honest near 0 and 1."""
    z = 1.96
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = (
        z
        / (1 + z * z / total)
        * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    )
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.no_grad()
def complete(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    sample: bool,
    seed: int = 0,
) -> list[tuple[str, int, bool]]:
    """Each prompt's completion, its length in tokens and whether it ended by itself."""
    model.eval()
    torch.manual_seed(seed)
    out = []
    for start in range(0, len(prompts), 100):
        inputs = tokenizer(
            prompts[start : start + 100], return_tensors="pt", padding=True, padding_side="left"
        )
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        ids_BT = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=MAX_NEW_TOKENS,
            **(settings if sample else {"do_sample": False}),
        )
        for row in ids_BT[:, inputs.input_ids.shape[1] :].tolist():
            ended = tokenizer.eos_token_id in row
            kept = row[: row.index(tokenizer.eos_token_id)] if ended else row
            out.append((tokenizer.decode(kept), len(kept) + ended, ended))
    return out


def answered(completion: str) -> str:
    return completion.rpartition("#")[2] if "#" in completion else ""


def measure(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, per_kind: int) -> str:
    """A Markdown table of accuracy on the test split."""
    lines = [
        "| kind | an example | greedy % | T=1 % | worked at T=1 % | mean tokens | ended % |",
        "|---|---|---|---|---|---|---|",
    ]
    means = [0.0, 0.0]
    for kind in arithmetic.KINDS:
        examples = arithmetic.generate("test", kinds=[kind], limit=per_kind)
        cells = []
        for sample in (False, True):
            done = complete(model, tokenizer, [e.problem for e in examples], sample=sample)
            right = sum(
                answered(text) == e.answer for (text, _, _), e in zip(done, examples, strict=True)
            )
            low, high = wilson(right, per_kind)
            cells.append(f"{100 * right / per_kind:.1f} ({100 * low:.1f} to {100 * high:.1f})")
            means[sample] += 100 * right / per_kind / len(arithmetic.KINDS)
        worked = 100 * sum("=" in text for text, _, _ in done) / per_kind
        length = sum(length for _, length, _ in done) / per_kind
        ended = 100 * sum(ended for _, _, ended in done) / per_kind
        lines.append(
            f"| {kind} | `{examples[0].problem}` | {cells[0]} | {cells[1]} "
            f"| {worked:.1f} | {length:.1f} | {ended:.1f} |"
        )
    lines.append(f"| **mean** | | **{means[0]:.1f}** | **{means[1]:.1f}** | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where the model goes")
    parser.add_argument("--steps", type=int, default=2500, help="steps of the skill phase")
    parser.add_argument("--habit-steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--per-kind", type=int, default=200, help="test problems of each kind")
    parser.add_argument(
        "--checkpoint", type=Path, help="keep the skill phase here; start from it if it is there"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.perf_counter()

    tokenizer = build_tokenizer()
    examples = arithmetic.generate("pretrain", seed=args.seed)
    finished = args.checkpoint and (args.checkpoint / "skill").exists()
    if finished:
        model = Qwen2ForCausalLM.from_pretrained(args.checkpoint / "skill")
    else:
        model = build_model(tokenizer)
        warmup = 100

        def cosine(step: int) -> float:
            if step < warmup:
                return SKILL_RATE * (step + 1) / warmup
            done = (step - warmup) / max(1, args.steps - warmup)
            return SKILL_FLOOR + (SKILL_RATE - SKILL_FLOOR) * (1 + math.cos(math.pi * done)) / 2

        train(
            model,
            tokenizer,
            skill_pairs(examples, random.Random(f"skill/{args.seed}")),
            name="skill",
            steps=args.steps,
            batch=SKILL_BATCH,
            rate=cosine,
            save_to=args.checkpoint / "running" if args.checkpoint else None,
        )
        if args.checkpoint:
            save(model, tokenizer, args.checkpoint / "skill")
    skill_seconds = time.perf_counter() - started
    print(f"after the skill phase\n{measure(model, tokenizer, args.per_kind)}", flush=True)

    habit_started = time.perf_counter()
    train(
        model,
        tokenizer,
        habit_pairs(examples, random.Random(f"habit/{args.seed}")),
        name="habit",
        steps=args.habit_steps,
        batch=HABIT_BATCH,
        rate=lambda step: HABIT_RATE * (1 - step / args.habit_steps),
    )
    save(model, tokenizer, args.out)
    habit_seconds = time.perf_counter() - habit_started
    print(f"the base\n{measure(model, tokenizer, args.per_kind)}", flush=True)
    took = "from a checkpoint" if finished else f"{skill_seconds:.0f} s"
    print(f"{model.num_parameters()} parameters; skill {took}; habit {habit_seconds:.0f} s")


if __name__ == "__main__":
    main()
