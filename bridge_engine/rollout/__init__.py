"""Sampling completions from a policy."""

from bridge_engine.rollout.native import Completion, SamplingParams, sample
from bridge_engine.rollout.sampler import NativeSampler, Sampler, make_sampler

__all__ = ["Completion", "NativeSampler", "Sampler", "SamplingParams", "make_sampler", "sample"]
