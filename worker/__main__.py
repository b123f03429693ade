"""`python -m worker`: run jobs. `python -m worker relay`: tell Celery's workers of them.

SIGTERM or Ctrl-C: engines save, jobs are handed back, then the process leaves. A second one: it
leaves at once, and the engines with it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

from pydantic import ValidationError

from service.settings import explain, get_settings
from service.store import Store
from service.variables import unknown
from worker import log


def main(arguments: list[str]) -> int:
    """The exit status."""
    try:
        settings = get_settings()
    except ValidationError as error:
        print(explain(error), file=sys.stderr)
        return 2
    what = arguments[0] if arguments else "local"
    if what not in ("local", "relay") or len(arguments) > 1:
        print("usage: python -m worker [local | relay]", file=sys.stderr)
        return 2
    if what == "local" and settings.dispatch == "celery":
        print(
            "BRIDGE_DISPATCH is celery: jobs come as messages. Run `celery -A worker.tasks worker` "
            "and, once, `python -m worker relay`.",
            file=sys.stderr,
        )
        return 2
    log.setup()
    for sentence in unknown(os.environ):
        log.warning(sentence)
    stop = threading.Event()

    def on_signal(number: int, _: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    store = Store.from_settings(settings)
    log.info("started", what=what, pid=os.getpid(), database=store.url.render_as_string())
    if what == "relay":
        from worker.relay import run_relay  # Celery belongs to the deployed form alone

        run_relay(store, settings, stop)
    else:
        from worker.local import run_local

        say_up()
        run_local(store, settings, stop)
    store.close()
    log.info("stopped", what=what)
    return 0


def say_up() -> None:
    """Tells the supervisor that started this process that nothing kept it from starting."""
    if number := os.environ.pop("BRIDGE_UP_FD", ""):
        with os.fdopen(int(number), "wb") as pipe:  # and closes it: it is no engine's to inherit
            pipe.write(b"\n")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
