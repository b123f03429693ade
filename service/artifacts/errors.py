"""What can go wrong with the artifact store: it cannot be had now, or it gives other bytes."""

from __future__ import annotations


class ArtifactsError(Exception):
    """Base of both; `message` is a sentence for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ArtifactsUnavailable(ArtifactsError):
    """The store does not answer, or not to us; the same may work later."""


class Damaged(ArtifactsError):
    """Something is missing, or is not what its hash says. Trying again does not help."""
