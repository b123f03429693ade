"""A supervisor over three tiny children instead of the real ones, for the tests of supervision.

    python -m tests.client.tiny_house HOME PORT [CRASHER[=STATUS]]

The child named CRASHER ends at once with status 3, or STATUS, every time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bridge_client.home import Home
from bridge_client.supervisor import CannotStartError, Supervisor

SERVER = """
import os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *_): pass
signal.signal(signal.SIGTERM, lambda *_: (print("stopped politely", flush=True), os._exit(0)))
print("started", flush=True)
HTTPServer(("127.0.0.1", int(os.environ.get(sys.argv[1], 0))), Handler).serve_forever()
"""
PORTS = {
    "service": "BRIDGE_PORT",
    "inference": "BRIDGE_INFERENCE_PORT",
    "worker": "WORKER_PORT",
}
"""The variable with the port each child listens on; a real worker has none, this one takes any."""
CRASH = "print('I cannot go on', flush=True); raise SystemExit({})"


def main() -> int:
    home = Home(Path(sys.argv[1]))
    with home.lock() as mine:
        if not mine:
            return 9
        supervisor = Supervisor(home, int(sys.argv[2]), say=lambda line: print(line, flush=True))
        crashers = {
            name: status or "3" for name, _, status in (a.partition("=") for a in sys.argv[3:])
        }
        for name, child in supervisor.children.items():
            code = CRASH.format(crashers[name]) if name in crashers else SERVER
            child.command = [sys.executable, "-c", code, PORTS[name]]
        try:
            return supervisor.run()
        except CannotStartError as error:
            print(error, flush=True)
            return error.status


if __name__ == "__main__":
    raise SystemExit(main())
