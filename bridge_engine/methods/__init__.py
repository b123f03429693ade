"""The methods, one page each: its options, its equations, its step. A new one is a page and a line.

Loads no torch: whoever only validates a spec needs the options alone.
"""

from functools import reduce
from importlib import import_module
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Discriminator, Tag

from bridge_engine.methods.base import (
    Exploration,
    Gradient,
    Imitation,
    Method,
    Movable,
    Objectives,
)
from bridge_engine.methods.options import Options

NAMES = (
    "sft",
    "rl",
    "cold_start",
    "alternating",
    "mix",
    "bridge",
    "chord",
    "luffy",
    "srft",
    "hpt",
    "relift",
)
"""The pages of this folder, in the order they are listed to people."""


def _defined_in(page: str, kind: Any) -> Any:
    """The one class of a kind that a page defines."""
    module = import_module(f"{__name__}.{page}")
    for value in vars(module).values():
        if not isinstance(value, type) or value.__module__ != module.__name__:
            continue
        if issubclass(value, kind):
            return value
    raise TypeError(f"{module.__name__} defines no {kind.__name__}")


PAGES: dict[str, type[Method[Any]]] = {name: _defined_in(name, Method) for name in NAMES}
METHODS: dict[str, type[Options]] = {name: _defined_in(name, Options) for name in NAMES}


def make_method(options: Options) -> Method[Any]:
    """The method that a spec's options describe."""
    return PAGES[options.name](options)


def _from_name(value: Any) -> Any:
    """`method: bridge` is short for `method: {name: bridge}`."""
    return {"name": value} if isinstance(value, str) else value


def _name_of(value: Any) -> str | None:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return name if isinstance(name, str) else None


if TYPE_CHECKING:
    MethodOptions = Options
else:
    MethodOptions = Annotated[
        reduce(or_, (Annotated[options, Tag(name)] for name, options in METHODS.items())),
        Discriminator(_name_of),
        BeforeValidator(_from_name),
    ]
    """What a spec's `method` may be."""

__all__ = [
    "METHODS",
    "Exploration",
    "Gradient",
    "Imitation",
    "Method",
    "MethodOptions",
    "Movable",
    "Objectives",
    "Options",
    "make_method",
]
