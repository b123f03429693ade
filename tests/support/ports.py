"""Ports for servers of a test's own, which nobody else takes before they listen, or while they are
away for a moment."""

from __future__ import annotations

import itertools
import os
import socket

from bridge_client import ports

_kept: list[socket.socket] = []
_FIRST, _BLOCK, _BLOCKS, _AT_ONCE = 12_000, 400, 48, 8
"""Below what Linux gives to those who ask for any port (32768 and more)."""
_rounds = itertools.count(os.getppid())  # another run on this machine begins elsewhere


def free_port() -> int:
    """A TCP port on loopback that is this process's until it ends.

    A server of a second's start would else find that somebody was given it meanwhile. It stays
    bound here without listening, so that the system gives it to nobody; who binds it by its number,
    with SO_REUSEADDR as servers do, can listen on it, and until then connections are refused.
    """
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind(("127.0.0.1", 0))
    _kept.append(keeper)
    return int(keeper.getsockname()[1])


def port_of_a_house() -> int:
    """A free port with more free ones behind it, as `bridge up` takes them for what it starts.

    It looks for these by itself, and what it finds it has not taken yet; so the processes that test
    at the same time have blocks of their own.
    """
    beside = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _AT_ONCE
    place = (_AT_ONCE * next(_rounds) + beside) % _BLOCKS
    return ports.free_port(_FIRST + _BLOCK * place)
