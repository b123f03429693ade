"""Is the answer right? Verification that can neither hang nor kill the process that asks."""

from bridge_engine.rewards.extract import stated_answer
from bridge_engine.rewards.verifier import Verdict, Verifier

__all__ = ["Verdict", "Verifier", "stated_answer"]
