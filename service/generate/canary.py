"""Is a loaded adapter the one that was exported? Its log-probabilities say so.

At export the engine notes how likely a fixed prompt was under the policy (`canary` in bridge.json),
and under the base without it. Before an adapter answers anybody, the backend is asked for the same
figures. Another adapter's weights, weights scaled wrongly or a base that is not the training's give
other ones; a backend that leaves the adapter out gives the base's, which after little training are
as near to the policy's as rounding is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from service.errors import ApiError

PATH = "/v1/completions"
TOLERANCE = {"float32": 0.01, "bfloat16": 0.2, "float16": 0.05}
"""Mean difference of log-probabilities, in nats, by the dtype that was trained in. Backends differ
by 4e-6 in float32 and by 0.03 in bfloat16."""
ROUNDING = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.01}
"""Root mean square of what a backend's figures may be off by rounding alone, in nats."""


class Canary:
    """The figures that were noted at export."""

    def __init__(
        self,
        tokens: list[int],
        logprobs: list[float],
        *dtypes: str,
        base: list[float] | None = None,
    ) -> None:
        """`dtypes`: that of training, and that of serving where it is another. `base`: the figures
        without the adapter, if they were noted."""
        self.tokens = tokens
        self.logprobs = logprobs
        self.tolerance = max(TOLERANCE.get(dtype, max(TOLERANCE.values())) for dtype in dtypes)
        # The distance on which rounding of each figure by itself all but never goes half the way.
        rounding = max(ROUNDING.get(dtype, max(ROUNDING.values())) for dtype in dtypes)
        told_apart = base is not None and math.dist(base, logprobs) > 8 * rounding
        self.base = base if told_apart else None

    @classmethod
    def of(cls, card: Mapping[str, Any], served: str = "") -> Canary | None:
        """Of the adapter with this bridge.json, `served` in that dtype where it is not training's;
        None if its export noted none."""
        noted: Any = card.get("canary")
        try:
            tokens = [int(token) for token in noted["tokens"]]
            logprobs = [float(value) for value in noted["logprobs"]]
            base = [float(value) for value in noted.get("base") or []]
            dtype = str(noted["dtype"])
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        if len(tokens) < 2 or len(logprobs) != len(tokens) - 1:
            return None
        known = base if len(base) == len(logprobs) else None
        return cls(tokens, logprobs, dtype, *([served] if served else []), base=known)

    def request(self, model: str) -> dict[str, Any]:
        """What the backend is asked."""
        return {
            "model": model,
            "prompt": self.tokens,
            "max_tokens": 1,
            "temperature": 0.0,
            "echo": True,
            "logprobs": 1,
        }

    def compare(self, answer: Mapping[str, Any]) -> None:
        """Raises ValueError where the backend's figures are others."""
        try:
            given = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(self.tokens)]
            found = [float(one) for one in given]
            pairs = list(zip(found, self.logprobs, strict=True))
            off = sum(abs(one - other) for one, other in pairs) / len(pairs)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ApiError(
                502, "inference_failed", f"inference gives no log-probabilities: {error!r}"
            ) from None
        if not off <= self.tolerance:
            raise ValueError(
                f"loaded, it is another policy than the one that was exported: its "
                f"log-probabilities of a fixed prompt are {off:.3g} nats off on average (at most "
                f"{self.tolerance:g} is rounding)"
            )
        if self.base and math.dist(found, self.base) < math.dist(found, self.logprobs):
            raise ValueError(
                "loaded, it answers as its base does without it: its log-probabilities of a fixed "
                "prompt are nearer to the base's than to those that were exported"
            )
