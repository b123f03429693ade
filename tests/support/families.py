"""The model families of the paper, tiny and random: true architectures, true tokenizer habits.

What makes a family is kept (which layers have a bias or a norm, how positions are scaled, whether
the head is the embedding, heads that do not add up to the hidden size, a vocabulary padded beyond
the tokenizer's, which token begins and which ends a text); only the sizes are small.
"""

from dataclasses import dataclass
from functools import cache

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CONTEXT = 256
PADDING = 13
"""Rows of the embedding that no token of the tokenizer uses (Qwen has some 270 of them)."""

CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

THINKING = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' and loop.last %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
"""ChatML that puts the thoughts of the last answer, here none, before it."""

HEADERS = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, messages = messages[0]['content'], messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today: ' + strftime_now('%d %b %Y') + '\\n\\n' + system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
"""Llama's headers, which tell the date."""


@dataclass(frozen=True, eq=False)
class Family:
    """One of them."""

    name: str
    config: type
    quirks: dict
    specials: tuple[str, ...]
    """The tokenizer's special tokens; the first one ends a text."""
    template: str
    answer_end: str
    """What its template ends an answer with."""
    digits: str
    """How its tokenizer splits numbers, as a pattern."""
    bos: str | None = None


FAMILIES = {
    "qwen2": Family(
        "qwen2",
        Qwen2Config,  # biases on q, k and v
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
        },
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        CHATML,
        "<|im_end|>",
        r"\p{N}",
    ),
    "llama": Family(
        "llama",
        LlamaConfig,
        {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": CONTEXT // 4,
            },
        },
        (
            "<|end_of_text|>",
            "<|begin_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        HEADERS,
        "<|eot_id|>",
        r"\p{N}{1,3}",
        bos="<|begin_of_text|>",
    ),
    "qwen3": Family(
        "qwen3",
        Qwen3Config,  # norms on queries and keys
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "tie_word_embeddings": False,
            "rope_theta": 1e6,
        },
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        THINKING,
        "<|im_end|>",
        r"\p{N}",
    ),
}


def save(name, folder, *, chat=True, seed=0):
    """Writes the family's model and tokenizer into a folder, as a base model comes; returns it.

    `chat`: with the chat template (base models of Qwen have one, Llama's have not).
    """
    family = FAMILIES[name]
    tokenizer = _tokenizer(family, chat)
    eos = tokenizer.eos_token_id
    config = family.config(
        vocab_size=len(tokenizer) + PADDING,
        intermediate_size=40,
        num_hidden_layers=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        **family.quirks,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():  # those that start as all 0 or all 1
            if path.endswith("bias") or "norm" in path:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    # what a base model's folder says of sampling is of no concern to training
    model.generation_config = GenerationConfig(eos_token_id=eos, do_sample=True, top_p=0.9)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def _tokenizer(family, chat):
    """A byte-level BPE of a few hundred tokens, special tokens behind the others."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(family.digits), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    text = "You are a helpful assistant. user system assistant The answer is 12+3=15,15-5=10#10"
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator([text] * 4, trainer)
    inner.add_special_tokens(list(family.specials))
    if family.bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, inner.token_to_id(family.bos))]
        )
    end = family.specials[0]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=family.bos,
        eos_token=end,
        pad_token=None if family.bos else end,  # Llama's has none
    )
    tokenizer.chat_template = family.template if chat else None
    return tokenizer
