"""The published shapes of the paper's three models, so that a job on one of them can be checked and
its cost estimated where neither the hub nor a copy is at hand.

Facts of the models' own config.json on the Hugging Face hub; `parameters` are the distinct weights
(a tied head is counted once), which the other figures imply and a test adds up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownModel:
    """A model that is known without being there."""

    parameters: int
    chat_template: bool
    """Does its tokenizer have one? Base models of Qwen do, Llama's do not."""
    config: Mapping[str, Any]
    """What the engine and the estimates read of its config.json."""


KNOWN: Mapping[str, KnownModel] = {
    "Qwen/Qwen2.5-3B": KnownModel(
        parameters=3_085_938_688,
        chat_template=True,
        config={
            "model_type": "qwen2",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": True,
        },
    ),
    "meta-llama/Llama-3.2-3B": KnownModel(
        parameters=3_212_749_824,
        chat_template=False,
        config={
            "model_type": "llama",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen/Qwen3-8B-Base": KnownModel(
        parameters=8_190_735_360,
        chat_template=True,
        config={
            "model_type": "qwen3",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
            "max_position_embeddings": 32_768,
            "tie_word_embeddings": False,
        },
    ),
}
