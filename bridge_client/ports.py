"""Ports: is one free, who holds it, which one to take instead."""

from __future__ import annotations

import socket

import psutil

LOOPBACK = "127.0.0.1"


def reachable(host: str) -> str:
    """What to call a listening address in a URL: one that means "every address" is no address."""
    known = {"0.0.0.0": LOOPBACK, "::": "[::1]"}
    return known.get(host) or (f"[{host}]" if ":" in host else host)


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Can a server listen there now?"""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def free_port(start: int, *, but: frozenset[int] = frozenset(), host: str = LOOPBACK) -> int:
    """The first free port from `start` on, else any the system gives."""
    for port in range(start, min(start + 100, 65536)):
        if port not in but and is_free(port, host):
            return port
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def holder(port: int) -> str:
    """Who listens on the port, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN
            if listens and connection.laddr and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()!r} (pid {connection.pid})"
    except psutil.Error:
        pass
    return "another program"
