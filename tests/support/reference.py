"""J_SFT and J_RL on a real transformer, written from the paper: the independent reference.

A separate copy of the model whose effective weights are W + s Σ B A, losses as sums over single
unpadded sequences in float64, and autograd on the objectives. It shares no code with the engine but
the model's architecture.
"""

import torch
from torch.func import functional_call

from tests.support.tiny import random_model


def with_exact_norms(model):
    """The same model with torch's own RMSNorms: transformers' compute in float32, whatever the
    weights are."""
    for layer in list(model.modules()):
        for name, norm in list(layer.named_children()):
            if hasattr(norm, "variance_epsilon"):
                exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(layer, name, exact)
    return model


class Reference:
    """J_SFT and J_RL as functions of leaf tensors, one unpadded sequence at a time."""

    def __init__(self, policy, names):
        self.model = with_exact_norms(random_model())
        self.scale = policy.adapters.lora.alpha / policy.adapters.lora.rank
        self.paths = list(policy.adapters.layers)
        self.leaves = {
            name: [
                (
                    layer.A[name].detach().clone().requires_grad_(),
                    layer.B[name].detach().clone().requires_grad_(),
                )
                for layer in policy.adapters.layers.values()
            ]
            for name in names
        }

    def logits(self, sequence, names):
        """At the places where the tokens of the completion are predicted."""
        weights = dict(self.model.named_parameters())
        for index, path in enumerate(self.paths):
            for name in names:
                a, b = self.leaves[name][index]
                key = f"{path}.weight"
                weights[key] = weights[key] + self.scale * b @ a
        tokens = torch.tensor([sequence.prompt + sequence.completion])
        logits = functional_call(self.model, weights, (tokens,)).logits[0]
        return logits[len(sequence.prompt) - 1 : -1]

    def logprobs(self, sequence, names):
        rows = torch.log_softmax(self.logits(sequence, names), -1)
        return rows[torch.arange(len(sequence.completion)), torch.tensor(sequence.completion)]

    def j_sft(self, demos, names):
        total = sum(len(d.completion) for d in demos)
        return sum(self.logprobs(d, names).sum() for d in demos) / total

    def j_rl(self, rollouts, names, low=0.2, high=0.2):
        total = sum(len(r.completion) for r in rollouts)
        value = 0.0
        for rollout in rollouts:
            old = torch.tensor(rollout.behaviour, dtype=torch.float32).double()
            advantage = torch.tensor(rollout.advantage, dtype=torch.float32).double()
            ratio = (self.logprobs(rollout, names) - old).exp()
            clipped = torch.clamp(ratio, 1 - low, 1 + high)
            value = value + torch.min(ratio * advantage, clipped * advantage).sum()
        return value / total

    def gradient(self, objective, name):
        flat = [leaf for pair in self.leaves[name] for leaf in pair]
        found = torch.autograd.grad(objective, flat, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, flat, strict=True)]

    def moved(self, name, rate, gradient):
        flat = [leaf.detach() for pair in self.leaves[name] for leaf in pair]
        return [x + rate * g for x, g in zip(flat, gradient, strict=True)]

    def set(self, name, values):
        """Puts the set where these tensors are, in the order of `moved`."""
        values = [v.detach().clone().requires_grad_() for v in values]
        self.leaves[name] = list(zip(values[::2], values[1::2], strict=True))
