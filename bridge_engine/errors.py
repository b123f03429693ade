"""Errors the engine can explain: what went wrong, where, and what to do about it."""

from typing import Literal

Category = Literal["user", "infra", "oom", "timeout", "internal"]


class EngineError(Exception):
    """An error with a name a program can act on and a sentence a person can act on.

    `code` is a stable snake_case word, `param` the dotted path of the spec field at fault (or
    None), `retryable` whether the same job can succeed when simply run again.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        category: Category = "user",
        param: str | None = None,
        retryable: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.category: Category = category
        self.param = param
        self.retryable = retryable
        self.step: int | None = None
        """The optimisation step (from 1) it happened in; filled in by the training loop."""


class DataError(EngineError):
    """A dataset that cannot be used; the message names the file and the line."""

    def __init__(self, message: str, *, code: str = "invalid_dataset", param: str | None = None):
        super().__init__(message, code=code, param=param)
