"""Sampling completions from a policy."""

from bridge_engine.rollout.native import Completion, SamplingParams, sample

__all__ = ["Completion", "SamplingParams", "sample"]
