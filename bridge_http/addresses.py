"""Where a server may listen, found out before it takes seconds to start."""

from __future__ import annotations

import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """Is what listens there reached from this machine alone?"""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def is_address(text: str) -> bool:
    """Is it an IP address, and not a name?"""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def obstacle(host: str, port: int) -> str | None:
    """What keeps a server from listening there, in the system's words; None if nothing does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As uvicorn will: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
        except OverflowError:
            return "a port is a number from 0 to 65535"
    return None
