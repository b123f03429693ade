"""A problem becomes the tokens that were meant, each special token once."""

import json
import shutil
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast

from bridge_engine.data.example import Example
from bridge_engine.data.template import (
    answer_ending,
    demonstration,
    end_tokens,
    prompt_tokens,
    render_chat,
    resolve_template,
)
from bridge_engine.errors import EngineError
from bridge_engine.models.catalog import resolve_model
from bridge_engine.policy import Policy
from bridge_engine.spec.train import LoraSpec, RuntimeSpec, TemplateSpec
from service.generate.prompting import TODAY

EXAMPLE = Example("e", "1+2?", "3", solution="1+2=3#3")
CHAT = (
    "{{ '<s>' }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(resolve_model("bridge-tiny").path)


@pytest.fixture
def with_bos():
    """A tokenizer that puts <s> in front of every text, as Llama's does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = {c: i for i, c in enumerate("0123456789+=?#[]abcdefghijklmnopqrstuvwxyz \n")}
    vocabulary = {**letters, "<s>": 50, "</s>": 51, "<unk>": 52}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 50)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = CHAT
    return made


def test_a_plain_prompt_is_the_text_and_a_demo_ends_in_eos(tokenizer):
    template = TemplateSpec(kind="plain")
    demo = demonstration(EXAMPLE, template, tokenizer, tokenizer.eos_token_id)
    assert tokenizer.decode(demo.prompt) == "1+2?"
    assert demo.completion[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(demo.completion[:-1]) == "1+2=3#3"
    assert tokenizer.eos_token_id not in demo.prompt


def test_system_text_and_suffix_surround_a_plain_problem(tokenizer):
    template = TemplateSpec(kind="plain", system="Sum: ", suffix=" =")
    assert tokenizer.decode(prompt_tokens("1+2?", template, tokenizer)) == "Sum: 1+2? ="


@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_the_beginning_of_sequence_comes_once_and_never_in_a_solution(with_bos, kind):
    demo = demonstration(EXAMPLE, TemplateSpec(kind=kind), with_bos, 51)
    assert demo.prompt.count(50) == 1
    assert demo.prompt[0] == 50
    assert 50 not in demo.completion
    assert demo.completion.count(51) == 1


def test_a_chat_prompt_is_the_tokenizers_own_template(with_bos):
    template = TemplateSpec(kind="chat", system="add", suffix="#")
    text = "".join(with_bos.convert_ids_to_tokens(prompt_tokens("1+2?", template, with_bos)))
    assert text == "<s>[system]add[user]1+2?#[assistant]"


def test_auto_is_chat_only_where_there_is_a_template(tokenizer, with_bos):
    assert resolve_template(TemplateSpec(), tokenizer).kind == "plain"
    assert resolve_template(TemplateSpec(), with_bos).kind == "chat"
    with pytest.raises(EngineError, match="no chat template"):
        resolve_template(TemplateSpec(kind="chat"), tokenizer)


ANSWERS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}AFTER{% endfor %}"


@pytest.mark.parametrize(
    ("after", "ending"),
    [
        ("{{ eos_token }}", [51]),
        ("{{ eos_token + '\\n' }}", [51]),
        ("{{ ' ' + eos_token }}", [42, 51]),  # as Llama 2 has it
        ("\n", []),
        ("", []),
    ],
)
def test_the_ending_of_an_answer_is_read_off_the_template(with_bos, after, ending):
    with_bos.chat_template = ANSWERS.replace("AFTER", after)
    assert answer_ending(with_bos) == ending
    demo = demonstration(EXAMPLE, TemplateSpec(kind="chat"), with_bos, 50)
    assert demo.completion[-len(ending or [50]) :] == (ending or [50])


def test_a_template_that_says_nothing_of_answers_ends_them_with_the_end_of_text(with_bos):
    for template in (
        "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}",
        "{{ messages[0].content }}",  # drops the answer
    ):
        with_bos.chat_template = template
        assert answer_ending(with_bos) == []
    with_bos.chat_template = None
    assert answer_ending(with_bos) == []


def test_a_completion_ends_at_every_token_that_anyone_names_and_each_is_named_once(with_bos):
    def ends(configured):
        config = SimpleNamespace(eos_token_id=configured)
        return end_tokens(SimpleNamespace(generation_config=config), with_bos)

    with_bos.chat_template = ANSWERS.replace("AFTER", "<s>")  # any special token will do
    assert ends(None) == [51, 50]
    assert ends(51) == [51, 50]
    assert ends([7, 51, 50]) == [51, 7, 50]
    with_bos.eos_token = None
    assert ends(None) == [50]
    with_bos.chat_template = None
    with pytest.raises(EngineError, match="names no token that ends an answer"):
        ends(None)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("tokenizer_config.json", "eos_token", "<eos>"),
        ("generation_config.json", "eos_token_id", 1),
    ],
)
def test_a_model_without_an_end_is_refused_and_what_the_message_says_to_do_helps(
    tmp_path, monkeypatch, file, key, value
):
    folder = tmp_path / "endless"
    shutil.copytree(resolve_model("bridge-tiny").path, folder)
    monkeypatch.setenv("BRIDGE_MODEL_DIR", str(tmp_path))

    def change(name, **entries):
        held = json.loads((folder / name).read_text()) | entries
        (folder / name).write_text(json.dumps(held))

    def ends():
        return Policy.load("endless", LoraSpec(), RuntimeSpec(device="cpu")).eos_ids

    change("tokenizer_config.json", eos_token=None)
    change("generation_config.json", eos_token_id=None)
    change("config.json", eos_token_id=None)
    with pytest.raises(EngineError) as refused:
        ends()
    assert (refused.value.code, refused.value.param) == ("no_eos", "model")
    for told in (file, key, "BRIDGE_MODEL_DIR"):
        assert told in refused.value.message
    change(file, **{key: value})
    assert ends() == [1]


def test_a_template_that_tells_the_date_tells_the_same_one_for_ever(with_bos):
    with_bos.chat_template = "{{ strftime_now('%Y') }}{{ messages[0].content }}"
    ids = prompt_tokens("?", TemplateSpec(kind="chat"), with_bos)
    assert "".join(with_bos.convert_ids_to_tokens(ids)) == "2024?"
    with_bos.chat_template = "{{ strftime_now('%d %b %Y') }}"
    assert render_chat([{"role": "user", "content": "?"}], with_bos) == TODAY, (
        "the day that the gateway tells vLLM"
    )


def test_a_chat_template_that_knows_no_system_message_says_what_to_leave_out(with_bos):
    """As Gemma's: what it raises is a template's error, not ours."""
    with_bos.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + CHAT
    )
    assert prompt_tokens("1+2?", TemplateSpec(kind="chat"), with_bos)
    for system in ("think", ""):  # an empty one is sent too
        with pytest.raises(EngineError, match=r"no system role; leave template\.system") as refused:
            prompt_tokens("1+2?", TemplateSpec(kind="chat", system=system), with_bos)
        assert refused.value.code == "chat_template_refused"
        assert refused.value.param == "template.system"
