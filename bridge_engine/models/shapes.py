"""The sizes of a Llama-like model (Llama, Mistral, Qwen, SmolLM), from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bridge_engine.models.catalog import ModelInfo


@dataclass(frozen=True)
class Shape:
    """Lengths of a model's axes; weights counted in scalars."""

    parameters: int
    """All weights, a tied head counted once."""
    hidden: int
    ffn: int
    layers: int
    queries: int
    """Heads times their size: outputs of q_proj."""
    keys: int
    """Key-value heads times their size: outputs of k_proj, and of v_proj."""
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of the linear layers of one block."""
        return {
            "q_proj": (self.hidden, self.queries),
            "k_proj": (self.hidden, self.keys),
            "v_proj": (self.hidden, self.keys),
            "o_proj": (self.queries, self.hidden),
            "gate_proj": (self.hidden, self.ffn),
            "up_proj": (self.hidden, self.ffn),
            "down_proj": (self.ffn, self.hidden),
        }

    def targeted(self, targets: list[str] | str) -> list[tuple[int, int]]:
        """(inputs, outputs) of the layers of one block that get adapters."""
        known = self.linears
        chosen = list(known) if targets == "all-linear" else targets
        return [known[name] for name in chosen if name in known]

    def linear_parameters(self, targets: list[str] | str = "all-linear") -> int:
        """Weights of the linear layers, of all blocks, without the head."""
        return self.layers * sum(i * o for i, o in self.targeted(targets))

    def adapter_parameters(self, rank: int, targets: list[str] | str) -> int:
        """Weights of one adapter: rank × (inputs + outputs) a layer."""
        return self.layers * sum(rank * (i + o) for i, o in self.targeted(targets))

    @property
    def head_parameters(self) -> int:
        """Weights of the output head."""
        return self.hidden * self.vocabulary


def shape_of(model: ModelInfo) -> Shape | None:
    """The model's shape; None where its config does not tell."""
    config = model.config
    hidden, ffn = _number(config, "hidden_size"), _number(config, "intermediate_size")
    heads, layers = _number(config, "num_attention_heads"), _number(config, "num_hidden_layers")
    vocabulary = _number(config, "vocab_size")
    if not (model.parameters and hidden and ffn and heads and layers and vocabulary):
        return None
    head = _number(config, "head_dim") or hidden // heads
    keys = (_number(config, "num_key_value_heads") or heads) * head
    return Shape(model.parameters, hidden, ffn, layers, heads * head, keys, vocabulary)


def _number(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    return value if isinstance(value, int) and value > 0 else None
