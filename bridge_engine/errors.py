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


class NonFinite(EngineError):
    """A loss or a gradient is NaN or infinite; nothing has been changed by it."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} became NaN or infinite; lower optimizer.student_lr and optimizer.teacher_lr, "
            "or go on from the last checkpoint, which is intact",
            code="non_finite",
        )
