"""Figures by which a served adapter is known again: how likely a fixed text is under the policy.

Other weights, a wrong scale or another base give other figures; they are compared before an adapter
answers anybody (`service.generate.canary`).
"""

from __future__ import annotations

from typing import Any

import torch

from bridge_engine.forward.logits import head_logits
from bridge_engine.policy import Policy

TEXT = "12+3-5?12+3=15,15-5=10#10 Tom has 5 apples and buys 7 more. 5 + 7 = 12."
"""Of the kind that is trained on; what a tokenizer does not know of it does no harm."""
LONGEST = 64


@torch.no_grad()
def canary(policy: Policy, names: tuple[str, ...]) -> dict[str, Any] | None:
    """{tokens, logprobs, base, dtype} of the text under these parameter sets; a log-probability for
    each token but the first. `base`: the same without any adapter, by which a server that leaves
    it out is told from one that rounds; absent where the base's own weights were trained. None
    where the tokenizer makes less than two tokens of the text."""
    tokens = list(policy.tokenizer(TEXT)["input_ids"])[:LONGEST]
    if len(tokens) < 2:
        return None
    base = {} if policy.full else {"base": _logprobs(policy, (), tokens)}
    return {
        "tokens": tokens,
        "logprobs": _logprobs(policy, names, tokens),
        **base,
        "dtype": str(policy.model.dtype).removeprefix("torch."),
    }


def _logprobs(policy: Policy, names: tuple[str, ...], tokens: list[int]) -> list[float]:
    ids_1L = torch.tensor([tokens], device=policy.device)
    with policy.using(*names):
        hidden_LD = policy.module.base_model(input_ids=ids_1L, use_cache=False).last_hidden_state[0]
        logprobs_LV = torch.log_softmax(head_logits(policy.module, hidden_LD[:-1]).float(), -1)
    picked = logprobs_LV.gather(1, ids_1L[0, 1:, None]).squeeze(1)
    return [round(value, 6) for value in picked.tolist()]
