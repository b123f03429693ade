"""The methods, one page each. A new one is a page here, a line below, and its options beside."""

from typing import Any

from bridge_engine.method_options import Options
from bridge_engine.methods.alternating import Alternating
from bridge_engine.methods.base import Gradient, Method, Movable, Objectives
from bridge_engine.methods.bridge import Bridge
from bridge_engine.methods.cold_start import ColdStart
from bridge_engine.methods.mix import Mix
from bridge_engine.methods.rl import Rl
from bridge_engine.methods.sft import Sft

_PAGES: dict[str, type[Method[Any]]] = {
    "sft": Sft,
    "rl": Rl,
    "cold_start": ColdStart,
    "alternating": Alternating,
    "mix": Mix,
    "bridge": Bridge,
}


def make_method(options: Options) -> Method[Any]:
    """The method that a spec's options describe."""
    return _PAGES[options.name](options)


__all__ = ["Bridge", "Gradient", "Method", "Movable", "Objectives", "make_method"]
