"""bridge-tiny: it loads as any model does, spells exactly, and is weak but not hopeless."""

from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2 import Qwen2ForCausalLM

from bridge_engine.data.arithmetic import KINDS, generate

PER_KIND = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine a model this small decodes ten times slower with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def directory() -> Path:
    with as_file(files("bridge_engine") / "assets" / "bridge-tiny") as path:
        return Path(path)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> Qwen2ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory)


def completions(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    sample: bool,
) -> list[str]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(0)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sample else {}
    ids_BT = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=64,
        **settings,
    )
    return tokenizer.batch_decode(ids_BT[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def share_right(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, kind: str, *, sample: bool
) -> float:
    examples = generate("test", kinds=[kind], limit=PER_KIND)
    done = completions(model, tokenizer, [e.problem for e in examples], sample=sample)
    right = [text.rpartition("#")[2] == e.answer for text, e in zip(done, examples, strict=True)]
    return sum(right) / PER_KIND


def test_the_asset_is_whole_small_and_plain_data(directory: Path) -> None:
    names = {path.name for path in directory.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt"))]
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 5_000_000


def test_it_loads_as_a_plain_qwen2(model: Qwen2ForCausalLM) -> None:
    assert type(model) is Qwen2ForCausalLM
    assert model.config.tie_word_embeddings
    assert model.num_parameters() < 1_000_000
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_model_tokenizer_and_generation_agree_on_special_tokens(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    assert len(tokenizer) == model.config.vocab_size
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id


def test_a_saved_tokenizer_is_the_same_when_loaded_again(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map


@pytest.mark.parametrize("split", ["train", "demos", "test"])
def test_problems_and_solutions_are_one_token_a_character(
    tokenizer: PreTrainedTokenizerBase, split: str
) -> None:
    for example in generate(split, kinds=KINDS, limit=200):
        for text in (example.problem, str(example.solution)):
            ids = tokenizer.encode(text)
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text
            assert ids == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    "text",
    ["", " a  b ", "1 , 2 .", "What is 2+2?\n\n\tFour !", "naïve λ θ̂ 数学 🦆", "don 't", "<|x|>"],
)
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_prompt_and_completion_tokenize_as_their_concatenation(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for example in generate("demos", limit=50):
        prompt, solution = example.problem, str(example.solution)
        together = tokenizer.encode(prompt + solution)
        assert together == tokenizer.encode(prompt) + tokenizer.encode(solution)


def test_it_is_weak_but_not_at_zero(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Above zero, or RL finds nothing to strengthen; well below one, or nothing is left to win."""
    for sample in (False, True):
        shares = [share_right(model, tokenizer, kind, sample=sample) for kind in KINDS]
        assert 0.02 < sum(shares) / len(shares) < 0.6, shares


def test_it_ends_by_itself_and_states_an_answer(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [e.problem for e in generate("test", limit=60)]
    done = completions(model, tokenizer, prompts, sample=True)
    assert sum("#" in text and len(text) < 64 for text in done) >= 57


def test_left_padding_changes_no_completion(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [e.problem for e in generate("test", limit=5)]
    alone = [completions(model, tokenizer, [prompt], sample=False)[0] for prompt in prompts]
    assert completions(model, tokenizer, prompts, sample=False) == alone
