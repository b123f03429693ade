"""A TCP proxy that can be cut, held up and healed: the network between a worker and Postgres."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time


class Proxy:
    """Listens on a port of its own and passes everything on to another one, while it is whole."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._flows = threading.Event()
        self._flows.set()
        self._cut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Breaks every connection, and lets none come about."""
        self._cut = True
        with self._lock:
            for pair in self._pairs:
                for end in pair:
                    with contextlib.suppress(OSError):
                        end.shutdown(socket.SHUT_RDWR)

    def hold_up(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._flows.clear()

    def heal(self) -> None:
        """As it was."""
        self._cut = False
        self._flows.set()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            if self._cut:
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            threading.Thread(target=self._pass, args=((near, far),), daemon=True).start()

    def _pass(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        with self._lock:
            self._pairs.add(pair)
        other = {near: far, far: near}
        try:
            while not self._cut:
                ready, _, _ = select.select(pair, [], [], 0.5)
                self._flows.wait()
                for end in ready:
                    if not (data := end.recv(65536)):
                        return
                    other[end].sendall(data)
        except OSError:
            return
        finally:
            with self._lock:
                self._pairs.discard(pair)
            time.sleep(0)
            near.close()
            far.close()
