"""Rows of different adapters in one forward pass: each is PEFT's own, whoever is beside it."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridge_engine.export import AdapterCard, export_adapter
from bridge_engine.export.canary import canary
from bridge_engine.models.catalog import resolve_model
from bridge_engine.policy import Policy
from bridge_engine.spec.train import LoraSpec, RuntimeSpec
from inference.batch import PREFILL, Batch
from inference.errors import InferenceError
from inference.lora import LoraWeights, read_lora
from inference.requests import Generation, collected
from inference.sampling import SamplingParams
from inference.scheduler import Scheduler
from inference.text import TextStream
from tests.support.batches import written_by, written_together

ADAPTERS = 8
PROMPTS = [f"{i + 3}+{2 * i + 1}-{i}?" for i in range(ADAPTERS)]
NEW = 24
MANY = 20_000


@pytest.fixture(scope="module")
def tiny() -> Path:
    torch.set_num_threads(1)
    path = resolve_model("bridge-tiny").path
    assert path is not None
    return path


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


@pytest.fixture(scope="module")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight random adapters of bridge-tiny, of ranks 2 to 9, large enough to change every answer;
    the last is on the attention alone."""
    found = []
    for seed in range(ADAPTERS):
        targets = ["q_proj", "v_proj"] if seed == ADAPTERS - 1 else "all-linear"
        config = LoraConfig(r=2 + seed, lora_alpha=8, target_modules=targets)
        model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.normal_(std=0.3)
        found.append(tmp_path_factory.mktemp(f"adapter{seed}"))
        model.save_pretrained(found[-1])
    return found


@pytest.fixture(scope="module")
def references(tiny: Path, folders: list[Path], tokenizer: Any) -> list[list[int]]:
    """Greedy tokens by transformers' generate through PEFT, an adapter at a time; the base last."""
    base: Any = AutoModelForCausalLM.from_pretrained(tiny).eval()
    model: Any = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=str(number))
    model.eval()
    found = []
    for number, prompt in enumerate(PROMPTS):
        model.set_adapter(str(number))
        found.append(_greedy(model, tokenizer, prompt))
    with model.disable_adapter():
        found.append(_greedy(model, tokenizer, PROMPTS[0]))
    assert len(set(map(tuple, found))) == len(found), "or nothing could be told apart"
    return found


def _greedy(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
    )
    return [int(token) for token in output[0, ids.shape[1] :]]


@pytest.fixture
def batch(tiny: Path, tokenizer: Any) -> Batch:
    return make_batch(tiny, tokenizer)


def make_batch(tiny: Path, tokenizer: Any, **options: Any) -> Batch:
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    ends = [tokenizer.eos_token_id]
    return Batch(model, tokenizer, ends, **{"rows": 64, "places": 100_000} | options)


@pytest.fixture
def loras(batch: Batch, folders: list[Path]) -> list[LoraWeights]:
    return [read_lora(f, batch.routing.shapes, "cpu", torch.float32) for f in folders]


def tokens_of(completion: Any) -> list[int]:
    return [info.id for info in completion.tokens]


def without_end(ids: list[int], tokenizer: Any) -> list[int]:
    return [token for token in ids if token != tokenizer.eos_token_id]


def test_adapters_answer_as_in_peft_alone_and_in_one_mixed_batch(
    batch: Batch, loras: list[LoraWeights], references: list[list[int]], tokenizer: Any
) -> None:
    params = SamplingParams(NEW, logprobs=0)
    who: list[LoraWeights | None] = [*loras, None]
    asked = [
        (tokenizer(prompt)["input_ids"], params, lora)
        for prompt, lora in zip([*PROMPTS, PROMPTS[0]], who, strict=True)
    ]
    expected = [without_end(ids, tokenizer) for ids in references]
    alone = [written_by(batch, *request)[0] for request in asked]
    assert [tokens_of(c) for c in alone] == expected
    together = written_together(batch, asked)
    assert [tokens_of(c) for (c,) in together] == expected


def test_rows_that_join_and_leave_in_the_middle_change_nobodys_answer(
    tiny: Path, folders: list[Path], references: list[list[int]], tokenizer: Any
) -> None:
    """Three rows at a time, so that nine requests come and go while others are being written."""
    batch = make_batch(tiny, tokenizer, rows=3)
    loras = [read_lora(f, batch.routing.shapes, "cpu", torch.float32) for f in folders]
    asked = [
        (tokenizer(PROMPTS[i])["input_ids"], SamplingParams(4 + 5 * (i % 4), logprobs=0), loras[i])
        for i in range(ADAPTERS)
    ]
    for (_, params, _), (found,), ids in zip(
        asked, written_together(batch, asked), references, strict=False
    ):
        assert tokens_of(found) == without_end(ids[: params.max_tokens], tokenizer)


def test_a_seed_gives_the_same_text_whoever_is_in_the_batch(
    batch: Batch, loras: list[LoraWeights], tokenizer: Any
) -> None:
    ids = tokenizer(PROMPTS[0])["input_ids"]
    seeded = SamplingParams(NEW, temperature=1.0, n=3, seed=7)
    alone = written_by(batch, ids, seeded, loras[0])
    others = [
        (tokenizer(p)["input_ids"], SamplingParams(NEW, temperature=1.3, seed=i), lora)
        for i, (p, lora) in enumerate(zip(PROMPTS, loras, strict=True))
    ]
    crowd = written_together(batch, [*others[:4], (ids, seeded, loras[0]), *others[4:]])
    assert crowd[4] == alone
    assert len({c.text for c in alone}) > 1


def test_a_long_prompt_is_read_in_pieces_between_which_others_go_on(
    batch: Batch, loras: list[LoraWeights], tokenizer: Any, tiny: Path, folders: list[Path]
) -> None:
    long = tokenizer("1+2-3*4" * 100)["input_ids"]
    assert len(long) > PREFILL
    short = tokenizer(PROMPTS[1])["input_ids"]
    params = SamplingParams(8, logprobs=0)

    async def run() -> list[Any]:
        first = Generation(batch, loras[1], short, SamplingParams(8, logprobs=0), stream=True)
        batch.waiting.append(first)
        batch.advance(lambda g, update: g.report([update]))
        (row,) = batch._rows
        before = row.count
        second = Generation(batch, loras[0], long, params)
        batch.waiting.append(second)
        batch.advance(lambda g, update: g.report([update]))
        assert batch._filling is not None, "it has begun and is not through"
        assert row.count == before + 1, "and the other got its next token meanwhile"
        while not batch.idle:
            batch.advance(lambda g, update: g.report([update]))
        return [await collected(first), await collected(second)]

    (first,), (second,) = asyncio.run(run())
    assert tokens_of(first) == tokens_of(written_by(batch, short, params, loras[1])[0])
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny), folders[0]
    ).eval()
    whole = torch.tensor([long + tokens_of(second)])
    with torch.no_grad():
        expected = torch.log_softmax(model(input_ids=whole).logits[0], -1)
    for place, info in enumerate(second.tokens, start=len(long)):
        assert info.logprob == pytest.approx(float(expected[place - 1, info.id]), abs=1e-3)


def test_echoed_log_probabilities_are_the_models_own(
    batch: Batch, loras: list[LoraWeights], tokenizer: Any, tiny: Path, folders: list[Path]
) -> None:
    ids = tokenizer("12+3-5?12+3=15")["input_ids"]

    async def run() -> list[Any]:
        made = Generation(batch, loras[2], ids, SamplingParams(1, logprobs=2, echo=True))
        batch.waiting.append(made)
        while not batch.idle:
            batch.advance(lambda g, update: g.report([update]))
        await collected(made)
        return made.prompt_logprobs

    found = asyncio.run(run())
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny), folders[2]
    ).eval()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0], -1)
    assert found[0].logprob is None
    for place, info in enumerate(found[1:]):
        assert info.id == ids[place + 1]
        assert info.logprob == pytest.approx(float(logprobs[place, info.id]), abs=1e-4)
        assert info.top[0][1] == pytest.approx(float(logprobs[place].max()), abs=1e-4)


def test_the_figures_of_an_export_are_what_serving_finds(
    batch: Batch, tokenizer: Any, tmp_path: Path
) -> None:
    """The canary: of the policy as it was trained, then of the adapter as it is served; and an
    adapter of other weights is told apart."""
    policy = Policy.load("bridge-tiny", LoraSpec(rank=4, alpha=8), RuntimeSpec(device="cpu"))
    rng = torch.Generator().manual_seed(3)
    for name in ("student", "teacher"):
        policy.add(name, 0)
        with torch.no_grad():
            for parameter in policy.parameters(name):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    names = ("student", "teacher")
    noted = canary(policy, names)
    assert noted is not None
    card = AdapterCard("bridge-tiny", "bridge", 1, 8, {"kind": "plain"}, 16, canary=noted)
    export_adapter(policy.adapters, names, tmp_path / "a", card)
    assert json.loads((tmp_path / "a" / "bridge.json").read_text())["canary"] == noted

    def found(lora: LoraWeights | None) -> list[float]:
        async def run() -> list[float]:
            params = SamplingParams(1, logprobs=0, echo=True)
            made = Generation(batch, lora, noted["tokens"], params)
            batch.waiting.append(made)
            while not batch.idle:
                batch.advance(lambda g, update: g.report([update]))
            await collected(made)
            return [info.logprob for info in made.prompt_logprobs[1:] if info.logprob is not None]

        return asyncio.run(run())

    served = read_lora(tmp_path / "a", batch.routing.shapes, "cpu", torch.float32)
    assert found(served) == pytest.approx(noted["logprobs"], abs=1e-4)
    off = [abs(one - other) for one, other in zip(found(None), noted["logprobs"], strict=True)]
    assert sum(off) / len(off) > 0.01


def test_an_adapter_that_leads_to_nan_harms_itself_alone(
    batch: Batch, loras: list[LoraWeights], references: list[list[int]], tokenizer: Any
) -> None:
    huge = {path: (a * 1e30, b * 1e30) for path, (a, b) in loras[1].layers.items()}
    params = SamplingParams(NEW, logprobs=0)

    async def run() -> tuple[Any, Any]:
        broken = Generation(
            batch, LoraWeights(huge, loras[1].rank), tokenizer(PROMPTS[1])["input_ids"], params
        )
        sound = Generation(batch, loras[0], tokenizer(PROMPTS[0])["input_ids"], params)
        batch.waiting += [broken, sound]
        while not batch.idle:
            batch.advance(lambda g, update: g.report([update]))
        with pytest.raises(InferenceError, match="not a number"):
            await collected(broken)
        return broken, await collected(sound)

    _, (sound,) = asyncio.run(run())
    assert tokens_of(sound) == without_end(references[0], tokenizer)
    again = written_by(batch, tokenizer(PROMPTS[0])["input_ids"], params, loras[0])
    assert tokens_of(again[0]) == without_end(references[0], tokenizer)


def test_weights_that_are_not_numbers_are_refused(
    batch: Batch, folders: list[Path], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folders[0], tmp_path / "nan")
    weights = load_file(folders[0] / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, tmp_path / "nan" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="finite"):
        read_lora(tmp_path / "nan", batch.routing.shapes, "cpu", torch.float32)


def test_who_hangs_up_leaves_the_batch(
    batch: Batch, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_end_ids", frozenset())  # it would write on for a minute
    written, took = [0], batch._took

    def counted(*row_and_token: Any) -> bool:
        written[0] += 1
        return took(*row_and_token)

    monkeypatch.setattr(batch, "_took", counted)

    async def run() -> None:
        made = Generation(batch, None, tokenizer("1+1?")["input_ids"], SamplingParams(MANY))
        scheduler = Scheduler(4)
        try:
            scheduler.submit(made)
            while not scheduler.figures()["running"]:
                await asyncio.sleep(0.005)
            scheduler.cancel(made)
            while scheduler.figures()["running"]:
                await asyncio.sleep(0.005)
        finally:
            scheduler.close()

    asyncio.run(run())
    assert written[0] < MANY


def test_closing_lets_the_begun_end_and_tells_the_waiting(
    tiny: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = make_batch(tiny, tokenizer, rows=1)
    closing, advance = threading.Event(), batch.advance

    def held(tell: Any) -> None:
        """Its first token is written, the others once it is closing: it has begun and not ended."""
        if batch.running():
            assert closing.wait(120)
        advance(tell)

    monkeypatch.setattr(batch, "advance", held)

    async def run() -> None:
        params = SamplingParams(NEW)
        ids = tokenizer(PROMPTS[0])["input_ids"]
        begun, waits = (Generation(batch, None, ids, params, stream=True) for _ in range(2))
        scheduler = Scheduler(4)
        scheduler.submit(begun)
        while not scheduler.figures()["running"]:
            await asyncio.sleep(0.001)
        scheduler.submit(waits)
        ends = asyncio.create_task(asyncio.to_thread(scheduler.close, 120))
        while not scheduler._draining:
            await asyncio.sleep(0.001)
        closing.set()
        await ends
        with pytest.raises(InferenceError) as refused:
            await collected(waits)
        assert refused.value.status == 503
        assert refused.value.retry_after
        assert (await collected(begun))[0].count > 0
        with pytest.raises(InferenceError):
            scheduler.submit(begun)

    asyncio.run(run())


# --------------------------------------------------------------------------- text


class Letters:
    """A tokenizer of UTF-8 bytes, each one a token."""

    backend_tokenizer = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode("utf-8", "replace")


def streamed(text: str, *stop: str) -> tuple[list[str], TextStream]:
    stream = TextStream(Letters(), stop)
    pieces = []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("nothing",), "one two three"),
        ("aab", ("aab",), ""),
        ("aaab", ("aab",), "a"),
        ("abcabd", ("abd",), "abc"),
        ("ends with begin", ("beginning",), "ends with begin"),
        ("x stop y", ("stop", " st"), "x"),
        ("grüße → ende", ("→",), "grüße "),
        ("\N{GRINNING FACE}!", (), "\N{GRINNING FACE}!"),
    ],
)
def test_a_stop_string_is_never_written_however_it_is_cut(
    text: str, stop: tuple[str, ...], expected: str
) -> None:
    pieces, stream = streamed(text, *stop)
    assert "".join(pieces) == expected
    assert stream.stopped == (expected != text)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    written = ""
    for piece in pieces:  # at no time was more written than is in the end
        written += piece
        assert expected.startswith(written)


def test_text_is_written_as_soon_as_it_is_certain() -> None:
    pieces, _ = streamed("abc st", "stop")
    assert pieces[:3] == ["a", "b", "c"]
    assert pieces[3:] == [" ", "", "", "st"]


def test_many_threads_may_submit_at_once(batch: Batch, tokenizer: Any) -> None:
    scheduler = Scheduler(64)
    ids = tokenizer(PROMPTS[0])["input_ids"]
    barrier = threading.Barrier(4)

    def one(seed: int) -> str:
        async def run() -> str:
            made = Generation(batch, None, ids, SamplingParams(8, temperature=1.0, seed=seed))
            barrier.wait()
            scheduler.submit(made)
            return (await collected(made))[0].text

        return asyncio.run(run())

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(one, [1, 2, 1, 2]))
    scheduler.close()
    assert texts[:2] == texts[2:]
