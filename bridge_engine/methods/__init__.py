"""The methods, one page each. A new one is a page here and a line below."""

from bridge_engine.methods.base import Gradient, Method, Movable, Objectives
from bridge_engine.methods.bridge import Bridge
from bridge_engine.methods.rl import Rl
from bridge_engine.methods.sft import Sft
from bridge_engine.spec import BridgeOptions, RlOptions, SftOptions


def make_method(options: SftOptions | RlOptions | BridgeOptions) -> Method:
    """The method that a spec's options describe."""
    match options:
        case SftOptions():
            return Sft(options)
        case RlOptions():
            return Rl(options)
        case BridgeOptions():
            return Bridge(options)


__all__ = ["Bridge", "Gradient", "Method", "Movable", "Objectives", "Rl", "Sft", "make_method"]
