"""A decode step of the models we know best, without the detours of general model code.

transformers' modules serve every architecture and spend half of a small decode step on Python and
many small kernels. Llama, Qwen2 and Qwen3 are one and the same block (RMSNorm, rotary positions,
grouped attention, SwiGLU), which is written out here once, on the model's own weights: what is
read together is multiplied together, keys and values are written into room that is there, heads
are turned as complex numbers, and on a CPU the weights are laid out for narrow products first
(`bridge_engine.forward.products.pack`). `lean` takes a model only if its configuration is one of
those, and only if both ways say the same of a few tokens; every other model runs on its modules
(`bridge_engine.rollout.decoding`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

from bridge_engine.forward.adapters import LoraLinear
from bridge_engine.forward.norms import exact, rms_norm
from bridge_engine.forward.products import pack
from bridge_engine.rollout.decoding import Decoder, ModuleDecoder, Prompts, additive, with_room

FAMILIES = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
ROPES = ("default", "linear", "llama3", "yarn")
"""Ways of scaling positions that do not depend on how long the text is."""

_agreeing: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def decoder(model: Any) -> Decoder:
    """What decodes this model, with the weights it has now, best."""
    if not _is_known(model):
        return ModuleDecoder(model)
    if model not in _agreeing:
        _agreeing[model] = _agrees(model)
    return LeanDecoder(model) if _agreeing[model] else ModuleDecoder(model)


def compute_dtype(model: Any) -> torch.dtype:
    """What products and attention are computed in: autocast's dtype, or that of the weights."""
    device = model.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = model.dtype
    return dtype


class LeanDecoder:
    """A `Decoder` on weights read from the model once, when it is made.

    Under autocast as the modules do it: products and attention in its dtype, what is between them
    in that of the weights.
    """

    def __init__(self, model: Any) -> None:
        inner = model.model
        self.dtype = compute_dtype(model)
        self.embedding = inner.embed_tokens.weight
        self.rotary = inner.rotary_emb
        self.blocks = [_Block(layer, model.config, self.dtype) for layer in inner.layers]
        self.norm = _norm(inner.norm)
        self.head = _product([model.lm_head], dtype=self.dtype)

    @torch.inference_mode()
    def start(self, prompts: Prompts, rows_R: Tensor, room: int) -> Tensor:
        """See `Decoder`."""
        mask_PL, positions_PL = prompts.mask_PL, prompts.positions_PL
        self.length = mask_PL.shape[1]
        hidden_PLD = self.embedding[prompts.tokens_PL]
        places_L = torch.arange(self.length + room, device=hidden_PLD.device)
        # both halves of a head are turned alike
        cos_LF, sin_LF = (
            x[0, :, : x.shape[-1] // 2] for x in self.rotary(hidden_PLD, places_L.unsqueeze(0))
        )
        self.turns_LF = torch.complex(exact(cos_LF), exact(sin_LF))
        # padding attends to itself: nothing is a mean over nothing
        own_LL = torch.eye(self.length, dtype=torch.bool, device=hidden_PLD.device)
        seen_P1LL = (mask_PL.unsqueeze(1) | own_LL).tril().unsqueeze(1)
        turns_PL1F = self.turns_LF[positions_PL].unsqueeze(2)
        for block in self.blocks:
            hidden_PLD = block.read(hidden_PLD, turns_PL1F, seen_P1LL)
            block.take(rows_R, room)
        self.positions_R = positions_PL[rows_R, -1]
        self.mask_RL = F.pad(mask_PL[rows_R], (0, room), value=True)
        self._look()
        return self._logits(hidden_PLD[:, -1])[rows_R]

    @torch.inference_mode()
    def keep(self, rows_R: Tensor) -> None:
        """See `Decoder`."""
        for block in self.blocks:
            block.take(rows_R, self.mask_RL.shape[1] - self.length)
        self.mask_RL, self.positions_R = self.mask_RL[rows_R], self.positions_R[rows_R]
        self._look()

    @torch.inference_mode()
    def step(self, tokens_R: Tensor) -> Tensor:
        """See `Decoder`."""
        self.length += 1
        self.positions_R = self.positions_R + 1
        hidden_RD = self.embedding[tokens_R]
        turns_R1F = self.turns_LF[self.positions_R].unsqueeze(1)
        for block in self.blocks:
            hidden_RD = block.step(hidden_RD, turns_R1F, self.bias_NGL[..., : self.length])
        return self._logits(hidden_RD)

    def _look(self) -> None:
        """What is added to attention scores, for each key head of each row."""
        block = self.blocks[0]
        bias_R11L = additive(self.mask_RL, self.dtype)
        groups = block.heads // block.key_heads
        self.bias_NGL = bias_R11L.expand(-1, block.key_heads, groups, -1).flatten(0, 1)

    def _logits(self, hidden_RD: Tensor) -> Tensor:
        (logits_RV,) = self.head(self.norm(hidden_RD))
        return logits_RV


class _Block:
    """One layer, and the keys and values that it has seen."""

    def __init__(self, layer: Any, config: Any, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.depth: int = attention.head_dim
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.scale: float = attention.scaling
        self.norm_in = _norm(layer.input_layernorm)
        self.norm_between = _norm(layer.post_attention_layernorm)
        self.norm_qk = _norm_of_heads(attention, self.heads, self.key_heads)
        self.dtype = dtype
        self.by_hand = dtype == torch.float32 and layer.input_layernorm.weight.device.type == "cpu"
        """Is the attention of one further token written out? For so few queries it is faster on a
        CPU; in less than float32 its scores would lose digits that torch's own keeps."""
        # queries and keys are turned together, and what is turned together stands side by side
        qk = [attention.q_proj, attention.k_proj]
        self.qk_v = _product(qk, [attention.v_proj], dtype=dtype, heads_of=self.depth)
        self.out = _product([attention.o_proj], dtype=dtype)
        self.gate_up = _product([mlp.gate_proj], [mlp.up_proj], dtype=dtype)
        self.down = _product([mlp.down_proj], dtype=dtype)

    def read(self, x_PLD: Tensor, turns_PL1F: Tensor, mask_P1LL: Tensor) -> Tensor:
        """Prompts, from their beginning."""
        q, k, v = (part.transpose(1, 2) for part in self._heads(x_PLD, turns_PL1F))
        self.length = x_PLD.shape[1]
        # written out, the scores take half the time where the keys of all tokens stand side by side
        self.cache = [k.transpose(2, 3) if self.by_hand else k, v]
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask_P1LL, scale=self.scale, enable_gqa=True
        )
        return self._rest(x_PLD, attended.transpose(1, 2).flatten(2))

    def take(self, rows_R: Tensor, room: int) -> None:
        """Goes on with these rows, and `room` further tokens."""
        lengthwise = (3, 2) if self.by_hand else (2, 2)
        self.cache = [
            with_room(kept.narrow(along, 0, self.length), rows_R, room, along)
            for kept, along in zip(self.cache, lengthwise, strict=True)
        ]

    def step(self, x_RD: Tensor, turns_R1F: Tensor, bias_NGL: Tensor) -> Tensor:
        """One further token a row."""
        q_RHE, k_RKE, v_RKE = self._heads(x_RD, turns_R1F)
        keys, values = self.cache
        keys.select(3 if self.by_hand else 2, self.length).copy_(k_RKE)
        values.select(2, self.length).copy_(v_RKE)
        self.length += 1
        # the query heads of one key head stand as a sequence of queries
        q_NGE = q_RHE.reshape(len(bias_NGL), -1, self.depth)
        v_NLE = values.flatten(0, 1)[:, : self.length]
        if self.by_hand:
            k_NEL = keys.flatten(0, 1)[..., : self.length]
            scores_NGL = torch.baddbmm(bias_NGL, q_NGE, k_NEL, alpha=self.scale)
            attended_NGE = torch.bmm(torch.softmax(scores_NGL, -1), v_NLE)
        else:
            k_NLE = keys.flatten(0, 1)[:, : self.length]
            (attended_NGE,) = F.scaled_dot_product_attention(
                q_NGE[None], k_NLE[None], v_NLE[None], attn_mask=bias_NGL[None], scale=self.scale
            )
        return self._rest(x_RD, attended_NGE.view(len(x_RD), -1))

    def _heads(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each token: … × heads × depth."""
        qk, v = (part.view(*part.shape[:-1], -1, self.depth) for part in self.qk_v(self.norm_in(x)))
        if self.norm_qk is not None:
            qk = self.norm_qk(qk)
        q, k = _in(self.dtype, _turned(qk, turns)).split_with_sizes(
            (self.heads, self.key_heads), -2
        )
        return q, k, v

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        (written,) = self.out(attended)
        x = x + written
        gate, up = self.gate_up(self.norm_between(x))
        (written,) = self.down(F.silu(gate).mul_(up))
        return x + written


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """(To ask torch for what is there already takes longer than to look.)"""
    return x if x.dtype == dtype else x.to(dtype)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Heads turned to their tokens' positions: pairs of numbers as complex ones."""
    pairs = exact(x).view(*x.shape[:-1], -1, 2)
    return torch.view_as_real(torch.view_as_complex(pairs) * turns).flatten(-2)


def _paired(x: Tensor, depth: int) -> Tensor:
    """Heads × depth, …: each head's numbers in another order, so that those which are turned
    together stand side by side; the models have them in the two halves of a head."""
    return x.view(-1, 2, depth // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    weight, epsilon = norm.weight.detach(), norm.variance_epsilon
    return lambda x: rms_norm(_in(weight.dtype, x), weight, epsilon)


def _norm_of_heads(attention: Any, heads: int, key_heads: int) -> Callable[[Tensor], Tensor] | None:
    """Of each query head and key head, where they have norms, as Qwen3's do."""
    if not hasattr(attention, "q_norm"):
        return None
    norms = attention.q_norm, attention.k_norm
    q, k = (_paired(norm.weight.detach(), attention.head_dim) for norm in norms)
    weight = torch.cat((q.expand(heads, -1), k.expand(key_heads, -1)))
    return lambda x: rms_norm(_in(weight.dtype, x), weight, norms[0].variance_epsilon)


def _product(
    *parts: Sequence[Any], dtype: torch.dtype, heads_of: int = 0
) -> Callable[[Tensor], Sequence[Tensor]]:
    """One input through these linear layers, with the adapters that are in use. There is one result
    a part, in which those of its layers stand side by side. With `heads_of`, the first is heads of
    that depth, each `_paired`."""
    weights, biases = [], []
    for part in parts:
        depth = heads_of if part is parts[0] else 0
        weights.append(_side_by_side([_weight(layer) for layer in part], dtype, depth))
        of_part = [layer.bias.detach() for layer in map(_linear, part) if layer.bias is not None]
        biases.append(_side_by_side(of_part, dtype, depth) if of_part else None)
    product = pack(weights, biases)
    return lambda x: product(_in(dtype, x))


def _side_by_side(tensors: Sequence[Tensor], dtype: torch.dtype, depth: int) -> Tensor:
    one = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
    return (_paired(one, depth) if depth else one).to(dtype)


def _linear(layer: Any) -> Any:
    return layer.base if isinstance(layer, LoraLinear) else layer


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight_in_use() if isinstance(layer, LoraLinear) else layer.weight
    return weight.detach()


# --------------------------------------------------------------------------- which models


def _is_known(model: Any) -> bool:
    """Is this one of the families, in every respect that a configuration can change?"""
    if type(model) not in FAMILIES:
        return False
    config = model.config
    rope = config.rope_parameters
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return (
        config._attn_implementation == "sdpa"
        and config.hidden_act == "silu"
        and set(layers) == {"full_attention"}
        and rope.get("rope_type") in ROPES
        and rope.get("partial_rotary_factor", 1.0) == 1.0
        and all(type(linear) is nn.Linear for linear in linears)
        and all(_has_weight(m) for m in model.modules() if isinstance(m, LoraLinear))
    )


def _has_weight(layer: LoraLinear) -> bool:
    """Is what it computes one product, not that of a base and of adapters beside it?"""
    return not layer.active or layer.merging is not None


@torch.no_grad()
def _agrees(model: Any) -> bool:
    """Do both ways say the same of two prompts and a token after each?"""
    device, size = model.device, model.config.vocab_size
    prompts = Prompts.of([[t % size for t in (1, 2, 3)], [4 % size]], pad_id=0, device=device)
    after = torch.tensor([t % size for t in (5, 6, 7)], device=device)

    def logits(decoder: Decoder) -> Tensor:
        first = decoder.start(prompts, torch.tensor([0, 1, 1], device=device), 1)
        return torch.stack((first, decoder.step(after))).float()

    expected = logits(ModuleDecoder(model))
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.merged = None  # two copies of the weights at once would be one too many
    limit = 1e-3 if compute_dtype(model) == torch.float32 else 1e-1  # two ways round differently
    return bool((logits(LeanDecoder(model)) - expected).norm() <= limit * expected.norm())
