"""Each preset asks as its convention is published, and no preset makes a spec impossible."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from bridge_engine.data.template import prompt_tokens, resolve_template
from bridge_engine.evaluation.presets import SENTENCE, AdapterCard, doubt, filled, remark
from bridge_engine.evaluation.spec import EvaluationSpec
from bridge_engine.spec.job import check, fill, parse_spec
from bridge_engine.spec.train import TemplateSpec

CARD = AdapterCard("base", TemplateSpec(kind="plain", system="As trained: "), 300)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def resolved(
    preset: str, card: AdapterCard | None = None, *, chat: bool = True, **changes: Any
) -> EvaluationSpec:
    document = {
        "kind": "eval",
        "benchmarks": ["math500", "aime24", "amc23"],
        "preset": preset,
        **({"adapter": "job_1@2"} if card else {}),
        **changes,
    }
    return filled(EvaluationSpec.model_validate(document), 32_768, card, chat=chat)


def prompt(spec: EvaluationSpec, tokenizer: Any) -> str:
    template = resolve_template(spec.template_of(spec.benchmarks[0]), tokenizer)
    text: str = tokenizer.decode(prompt_tokens("1+1?", template, tokenizer))
    return text


@pytest.fixture(scope="module", params=[True, False], ids=["chat", "plain"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A tokenizer of bytes, with Qwen's chat template or with none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    inner = Tokenizer(models.BPE(vocab=letters, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)
    if request.param:
        made.chat_template = CHATML
    return made


def turns(user: str, system: str | None = None) -> str:
    head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{head}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


ASKED = {
    "bridge": (turns(f"1+1?\n{SENTENCE}"), f"1+1?\n{SENTENCE}"),
    "qwen2.5-math": (turns("1+1?", SENTENCE), f"1+1?\n{SENTENCE}"),
    "simplerl": (
        turns(f"1+1?\n{SENTENCE}", "You are a helpful assistant."),
        "Question:\n1+1?\nAnswer:\nLet's think step by step.\n",
    ),
    "luffy": (turns("1+1?"), "User: 1+1?\nAnswer: Let's think step by step."),
}


@pytest.mark.parametrize("preset", ASKED)
def test_a_problem_is_asked_with_the_words_of_the_convention(preset: str, tokenizer: Any) -> None:
    chat = tokenizer.chat_template is not None
    assert prompt(resolved(preset, chat=chat), tokenizer) == ASKED[preset][0 if chat else 1]


@pytest.mark.parametrize(
    ("preset", "sampling", "samples"),
    [
        ("bridge", (0.0, 1.0, 2048), [1, 1, 1]),
        ("qwen2.5-math", (0.0, 1.0, 2048), [1, 1, 1]),
        ("simplerl", (1.0, 0.95, 16_000), [1, 32, 1]),
        ("luffy", (0.6, 1.0, 8192), [1, 32, 32]),
    ],
)
def test_answers_are_drawn_as_the_convention_has_it(
    preset: str, sampling: tuple[float, float, int], samples: list[int]
) -> None:
    spec = resolved(preset)
    drawn = spec.sampling
    assert (drawn.temperature, drawn.top_p, drawn.max_new_tokens) == sampling
    assert [spec.samples_of(one) for one in spec.benchmarks] == samples


def test_an_adapter_is_asked_as_it_was_trained_where_the_convention_does_that() -> None:
    """LUFFY's script takes each model's own template; the others theirs, whoever is asked."""
    for preset, template, limit in [
        ("bridge", CARD.template, 300),
        ("luffy", CARD.template, 8192),
        ("qwen2.5-math", TemplateSpec(kind="chat", system=SENTENCE), 2048),
    ]:
        spec = resolved(preset, CARD)
        assert (spec.template, spec.sampling.max_new_tokens) == (template, limit)


def test_greedy_decoding_takes_one_sample_of_what_a_preset_samples_often() -> None:
    """As SimpleRL decodes the baselines."""
    spec = resolved("simplerl", sampling={"temperature": 0, "top_p": 1})
    assert [spec.samples_of(one) for one in spec.benchmarks] == [1, 1, 1]
    assert EvaluationSpec.model_validate(spec.model_dump()) == spec


def test_who_asks_as_luffy_does_is_told_where_its_policies_prompt_stands() -> None:
    said = remark(resolved("luffy", model="Qwen/Qwen2.5-3B"))
    assert said is not None
    assert "Qwen/Qwen2.5-3B" in said
    assert "2504.14945" in said
    assert "--set template.system=@FILE" in said
    assert remark(resolved("luffy", CARD)) is None
    assert remark(resolved("luffy", chat=False)) is None
    assert remark(resolved("luffy", completions_of="job_1")) is None
    assert remark(resolved("luffy", template={"system": "Think."})) is None
    assert remark(resolved("qwen2.5-math")) is None


def test_a_plain_prompt_that_a_preset_took_from_a_chat_model_is_doubted(tokenizer: Any) -> None:
    chat = tokenizer.chat_template is not None
    said = doubt(resolved("simplerl", chat=False, model="some/chatty"), tokenizer)
    assert (said is not None) == chat
    if said is not None:
        assert "some/chatty" in said
        assert "not the scores of the convention" in said
    assert doubt(resolved("bridge", chat=False), tokenizer) is None  # its prompt is either
    assert doubt(resolved("simplerl", template={"kind": "plain"}), tokenizer) is None  # as wished
    assert doubt(resolved("luffy", CARD, chat=False), tokenizer) is None


def test_filling_twice_changes_nothing_and_a_tokenizer_without_a_template_is_seen() -> None:
    document = {"kind": "eval", "benchmarks": "arithmetic", "preset": "qwen2.5-math"}
    for model, kind in (("bridge-tiny", "plain"), ("Qwen/Qwen2.5-3B", "chat")):
        once = fill(parse_spec({**document, "model": model}))
        assert isinstance(once, EvaluationSpec)
        assert once.template is not None
        assert once.template.kind == kind
        assert fill(once) == once
        assert check(once) == []
