"""How much is kept in memory, and how much is computed at once. Needs no torch to be read."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ADAPTERS = 32
MAX_BASES = 2


@dataclass(frozen=True)
class Limits:
    """How much is kept, and how much is computed at once."""

    adapters: int = MAX_ADAPTERS
    bases: int = MAX_BASES
    memory: int | None = None
    """Bytes of base models and adapters together; None: whatever there is."""
    rows: int = 64
    """Completions of one base that are written at the same time."""
    cache: int = 1 << 30
    """Bytes of keys and values of each base's rows."""
