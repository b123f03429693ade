"""`python -m inference [--host HOST] [--port PORT]`: serves base models and adapters on loopback.

Reads, each named BRIDGE_INFERENCE_…:
PORT (8001);
DEVICE (auto);
THREADS (1: with more, a busy machine gets slower, not faster);
QUEUE (64 requests may wait to be begun);
ROWS (64 completions of one base are written at the same time);
MAX_ADAPTERS (32) and MAX_MODELS (2), how many stay loaded;
MEMORY_GB (60 % of what the machine, or its GPU, has), for all that is loaded;
CACHE_MB (1024), for the keys and values of each base's rows.

And BRIDGE_ALLOWED_HOSTS (names, with commas between, that it may be called by beside localhost,
127.0.0.1, [::1] and HOST). Exits with status 2 and one sentence when it cannot start. SIGTERM lets
what has begun go on for ten seconds and sends away what waits.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from types import FrameType

from bridge_http.addresses import is_loopback, obstacle
from inference.limits import MAX_ADAPTERS, MAX_BASES, Limits

CANNOT_START = 2
_YES = ("1", "true", "yes", "on", "t", "y")
"""As the service's settings read a switch."""


def main(arguments: list[str] | None = None) -> int:
    """Serves until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser(prog="python -m inference", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    numbers = Numbers()
    port = numbers.whole("BRIDGE_INFERENCE_PORT", 8001, least=0)
    parser.add_argument("--port", type=int, default=port)
    options = parser.parse_args(arguments)
    queue = numbers.whole("BRIDGE_INFERENCE_QUEUE", 64)
    threads = numbers.whole("BRIDGE_INFERENCE_THREADS", 1)
    limits = Limits(
        adapters=numbers.whole("BRIDGE_INFERENCE_MAX_ADAPTERS", MAX_ADAPTERS),
        bases=numbers.whole("BRIDGE_INFERENCE_MAX_MODELS", MAX_BASES),
        memory=numbers.memory(),
        rows=numbers.whole("BRIDGE_INFERENCE_ROWS", 64),
        cache=numbers.whole("BRIDGE_INFERENCE_CACHE_MB", 1024) * 2**20,
    )
    if not numbers.wrong and (refusal := _refusal(options.host, options.port)):
        numbers.wrong.append(refusal)
    if numbers.wrong:
        print("\n".join(numbers.wrong), file=sys.stderr)
        return CANNOT_START

    # Imported only now: torch takes seconds, and a taken port should be told at once.
    import torch
    import uvicorn
    from transformers.utils.logging import disable_progress_bar

    from bridge_engine.models.folders import materialize_model
    from bridge_http.heads import HTTP
    from bridge_http.requests import UVICORN, set_up_logging
    from inference.app import GRACE_SECONDS, create_app

    disable_progress_bar()  # a log file is no terminal
    torch.set_num_threads(threads)
    device = os.environ.get("BRIDGE_INFERENCE_DEVICE", "auto")
    if limits.memory is None:
        limits = replace(limits, memory=_memory_of(device))
    # The thread that computes and the one that answers take turns; by default every 5 ms, about
    # as long as a small model takes for a token.
    sys.setswitchinterval(0.0005)
    app = create_app(
        materialize_model,
        waiting=queue,
        device=device,
        limits=limits,
        hosts=[options.host, *filter(None, os.environ.get("BRIDGE_ALLOWED_HOSTS", "").split(","))],
    )

    class Server(uvicorn.Server):
        """Tells the scheduler at once that nothing new may begin, not when all have hung up."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.scheduler.drain()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        *(app, options.host, options.port),
        http=HTTP,
        timeout_graceful_shutdown=int(GRACE_SECONDS),
        **UVICORN,
    )
    set_up_logging()
    Server(config).run()
    return 0


class Numbers:
    """Reads numbers from the environment, and keeps what is wrong with them, to be told at once."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def whole(self, name: str, default: int, least: int = 1) -> int:
        """A whole number of at least `least`."""
        text = os.environ.get(name, "") or str(default)
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            self.wrong.append(f"{name} must be a whole number of at least {least}, not {text!r}.")
        return number

    def memory(self) -> int | None:
        """Bytes that may be loaded, where that is said."""
        text = os.environ.get("BRIDGE_INFERENCE_MEMORY_GB", "")
        if not text:
            return None
        try:
            given = float(text)
        except ValueError:
            given = 0.0
        if not 0 < given < 1e9:
            self.wrong.append(f"BRIDGE_INFERENCE_MEMORY_GB must be a number above 0, not {text!r}.")
        return int(given * 1e9) if given < 1e9 else None


def _memory_of(device: str) -> int:
    """60 % of what the machine has, or its GPU."""
    import psutil
    import torch

    on_gpu = device != "cpu" and torch.cuda.is_available()
    total = torch.cuda.mem_get_info()[1] if on_gpu else psutil.virtual_memory().total
    return int(0.6 * total)


def _refusal(host: str, port: int) -> str | None:
    """Why it cannot listen there, or None."""
    allowed = os.environ.get("BRIDGE_ALLOW_UNAUTHENTICATED", "").lower() in _YES
    if not (is_loopback(host) or allowed):
        return (
            f"Inference has no authentication and listens on loopback only, not on {host}. "
            "Leave --host at 127.0.0.1, or set BRIDGE_ALLOW_UNAUTHENTICATED=1 where the network "
            "itself is private."
        )
    if (reason := obstacle(host, port)) is not None:
        return (
            f"Inference cannot listen on {host}:{port} ({reason}): stop what uses the "
            "port, or set BRIDGE_INFERENCE_PORT to a free one."
        )
    return None


if __name__ == "__main__":
    raise SystemExit(main())
