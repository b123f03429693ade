"""The relay's own troubles: whatever the broker does, it goes on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import cast

import pytest
from celery import Celery
from kombu.exceptions import OperationalError

from service.settings import Settings
from service.store import Store
from worker import relay


@pytest.fixture
def dying_broker() -> Iterator[str]:
    """Accepts connections, and ends them at the first word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return
                near.recv(1)
                near.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
        listener.shutdown(socket.SHUT_RDWR)


def test_a_broker_that_dies_while_it_is_asked_is_a_broker_out_of_reach(
    dying_broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "app", Celery(broker=dying_broker, set_as_current=False))
    monkeypatch.setattr("kombu.connection.Connection.ensure_connection", lambda *_, **__: None)
    with pytest.raises(OperationalError):
        relay.queue_lengths()


def test_the_relay_goes_on_after_an_error_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It died of one, while the process lived on and sent no message any more."""
    stop, calls = threading.Event(), []

    def send(_: Store, window: int) -> int:
        calls.append(1)
        if len(calls) == 2:
            stop.set()
        raise RuntimeError("nobody has thought of this")

    monkeypatch.setattr(relay, "relay", send)
    monkeypatch.setattr(relay, "reconcile_forever", lambda *_: None)
    relay.run_relay(cast(Store, None), Settings(poll_seconds=0.01), stop)
    assert len(calls) == 2
