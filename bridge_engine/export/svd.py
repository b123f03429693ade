"""A full student as an adapter: the best one of its rank.

What training changed in a layer, ΔW = W_now + ΔW_teacher − W_initial, is cut to its largest
singular values (Eckart and Young 1936: no other matrix of that rank is nearer in the Frobenius
norm). What changed elsewhere, in embeddings, norms and the head, no adapter on linear layers can
hold; both losses are in the card's `relative_error`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bridge_engine.export.adapter import write_peft
from bridge_engine.export.card import AdapterCard
from bridge_engine.export.merged import merged_weights
from bridge_engine.loading import load_pretrained
from bridge_engine.models import materialize_model
from bridge_engine.policy import Policy


@torch.no_grad()
def export_svd(
    policy: Policy, names: tuple[str, ...], folder: Path, card: AdapterCard
) -> tuple[str, float]:
    """Writes the adapter of rank `card.rank`; returns the SHA-256 of its weights and its error.

    The initial weights are read again from the base's folder, for the time of the export.
    """
    initial, _ = load_pretrained(
        materialize_model(card.base_model), torch.float32, torch.device("cpu")
    )
    before = dict(initial.named_parameters())
    pairs, error = factorise(merged_weights(policy, names), before, policy, card.rank)
    written = replace(card, form="svd", relative_error=error)
    return write_peft(pairs, card.rank, folder, written), error


def factorise(
    now: dict[str, Tensor], before: dict[str, Tensor], policy: Policy, rank: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """((A, B) of each adapted layer with B A ≈ ΔW, the relative Frobenius error over all weights).

    A layer smaller than the rank is padded with zeros: PEFT wants one rank for all.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    changed, lost = 0.0, 0.0
    for name, weight in now.items():
        delta = weight.double() - before[name].double()
        square = float(delta.square().sum())
        changed += square
        path = name.removesuffix(".weight")
        if path not in policy.adapters.layers:
            lost += square
            continue
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        lost += float(s[rank:].square().sum())
        root = s[:rank].sqrt()
        a = delta.new_zeros(rank, delta.shape[1])
        b = delta.new_zeros(delta.shape[0], rank)
        a[: len(root)] = root.unsqueeze(1) * v[:rank]
        b[:, : len(root)] = u[:, :rank] * root
        pairs[path] = (a.float(), b.float())
    return pairs, math.sqrt(lost / changed) if changed else 0.0
