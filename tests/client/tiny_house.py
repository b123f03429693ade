"""A supervisor over three tiny children instead of the real ones, for the tests of supervision.

    python -m tests.client.tiny_house HOME PORT [CRASHER[=STATUS[:SECONDS]]]

The child named CRASHER ends with status 3, or STATUS, at once or after SECONDS, every time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bridge_client.home import Home
from bridge_client.ports import LOOPBACK
from bridge_client.supervisor import CannotStartError, Supervisor, make_way

SERVER = """
import os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
signal.signal(signal.SIGTERM, lambda *_: (print("stopped politely", flush=True), os._exit(0)))
print("started", flush=True)
os.write(int(os.environ["BRIDGE_UP_FD"]), b"\\n")
HTTPServer(("127.0.0.1", int(os.environ.get(sys.argv[1], 0))), Handler).serve_forever()
"""
PORTS = {
    "service": "BRIDGE_PORT",
    "inference": "BRIDGE_INFERENCE_PORT",
    "worker": "WORKER_PORT",
}
"""The variable with the port each child listens on; a real worker has none, this one takes any."""
CRASH = """
import time
time.sleep({seconds})
print("I cannot go on", flush=True)
raise SystemExit({status})
"""


def crash(argument: str) -> tuple[str, str]:
    """A child's name, and the program that it is instead."""
    name, _, how = argument.partition("=")
    status, _, seconds = how.partition(":")
    return name, CRASH.format(status=status or 3, seconds=seconds or 0)


def main() -> int:
    home = Home(Path(sys.argv[1]))
    with home.lock() as mine:
        if mine is None:
            return 9
        port = int(sys.argv[2])

        def say(line: str) -> None:
            print(line, flush=True)

        make_way(home, port, LOOPBACK, say)
        supervisor = Supervisor(home, port, say=say)
        crashes = dict(crash(argument) for argument in sys.argv[3:])
        for name, child in supervisor.children.items():
            child.command = [sys.executable, "-c", crashes.get(name, SERVER), PORTS[name]]
        try:
            return supervisor.run()
        except CannotStartError as error:
            print(error, flush=True)
            return error.status


if __name__ == "__main__":
    raise SystemExit(main())
