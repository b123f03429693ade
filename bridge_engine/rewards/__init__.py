"""Is the answer right? Verification that can neither hang nor kill the process that asks."""

from bridge_engine.rewards.extract import stated_answer
from bridge_engine.rewards.verifier import Case, Verdict, Verifier

__all__ = ["Case", "Verdict", "Verifier", "stated_answer"]
