"""One line an event: time, level, what happened, then `name=value`. For people and for grep."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

_logger = logging.getLogger("worker")


def setup() -> None:
    """Lets the process log to stderr in this form."""
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(
        "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S"
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def info(event: str, **fields: Any) -> None:
    """Something that is as it should be."""
    _logger.info(_line(event, fields))


def warning(event: str, **fields: Any) -> None:
    """Something a person may have to look at."""
    _logger.warning(_line(event, fields))


def exception(event: str, **fields: Any) -> None:
    """A mistake in Bridge itself, with its traceback."""
    _logger.exception(_line(event, fields))


def _line(event: str, fields: dict[str, Any]) -> str:
    return " ".join([event, *(f"{name}={_value(value)}" for name, value in fields.items())])


def _value(value: Any) -> str:
    text = str(value)
    plain = text and not any(c.isspace() or c in '"=' for c in text)
    return text if plain else json.dumps(text, ensure_ascii=False)
