"""`python -m inference [--host HOST] [--port PORT]`: serves base models and adapters on loopback.

Reads BRIDGE_INFERENCE_PORT (8001), BRIDGE_INFERENCE_THREADS (1: with more, a busy machine gets
slower, not faster), BRIDGE_INFERENCE_QUEUE (64 waiting requests), BRIDGE_INFERENCE_DEVICE (auto),
BRIDGE_INFERENCE_MAX_ADAPTERS (32) and BRIDGE_INFERENCE_MAX_MODELS (2; both are how many stay
loaded), and BRIDGE_ALLOWED_HOSTS (names, with commas between, that it may be called by beside
localhost, 127.0.0.1, [::1] and HOST). Exits with status 2 and one sentence when it cannot start.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys

CANNOT_START = 2
_YES = ("1", "true", "yes", "on", "t", "y")
"""As the service's settings read a switch."""


def main(arguments: list[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m inference", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=_number("BRIDGE_INFERENCE_PORT", 8001, least=0))
    options = parser.parse_args(arguments)
    refusal = _refusal(options.host, options.port)
    if refusal:
        print(refusal, file=sys.stderr)
        return CANNOT_START

    # Imported only now: torch takes seconds, and a taken port should be told at once.
    import torch
    import uvicorn
    from transformers.utils.logging import disable_progress_bar

    from bridge_engine.models import materialize_model
    from inference.app import create_app
    from inference.registry import MAX_ADAPTERS, MAX_BASES

    disable_progress_bar()  # a log file is no terminal
    torch.set_num_threads(_number("BRIDGE_INFERENCE_THREADS", 1))
    app = create_app(
        materialize_model,
        waiting=_number("BRIDGE_INFERENCE_QUEUE", 64),
        device=os.environ.get("BRIDGE_INFERENCE_DEVICE", "auto"),
        max_adapters=_number("BRIDGE_INFERENCE_MAX_ADAPTERS", MAX_ADAPTERS),
        max_bases=_number("BRIDGE_INFERENCE_MAX_MODELS", MAX_BASES),
        hosts=[options.host, *filter(None, os.environ.get("BRIDGE_ALLOWED_HOSTS", "").split(","))],
    )
    uvicorn.run(
        app, host=options.host, port=options.port, log_level="info", timeout_graceful_shutdown=5
    )
    return 0


def _refusal(host: str, port: int) -> str | None:
    """Why it cannot listen there, or None."""
    allowed = os.environ.get("BRIDGE_ALLOW_UNAUTHENTICATED", "").lower() in _YES
    if not (_is_loopback(host) or allowed):
        return (
            f"Inference has no authentication and listens on loopback only, not on {host}. "
            "Leave --host at 127.0.0.1, or set BRIDGE_ALLOW_UNAUTHENTICATED=1 where the network "
            "itself is private."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return (
                f"Inference cannot listen on {host}:{port} ({error.strerror}): stop what uses the "
                "port, or set BRIDGE_INFERENCE_PORT to a free one."
            )
    return None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _number(name: str, default: int, least: int = 1) -> int:
    text = os.environ.get(name, "") or str(default)
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        print(f"{name} must be a whole number of at least {least}, not {text!r}.", file=sys.stderr)
        raise SystemExit(CANNOT_START)
    return number


if __name__ == "__main__":
    raise SystemExit(main())
