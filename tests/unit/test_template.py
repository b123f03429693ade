"""A problem becomes the tokens that were meant, each special token once."""

import pytest
from transformers import PreTrainedTokenizerFast

from bridge_engine.catalog import resolve_model
from bridge_engine.data.example import Example
from bridge_engine.errors import EngineError
from bridge_engine.spec import TemplateSpec
from bridge_engine.template import demonstration, prompt_tokens, resolve_template

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
