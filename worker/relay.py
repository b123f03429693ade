"""From the outbox to the broker: tells Celery's workers which jobs wait.

A message is sent at least once. It may be sent twice (this process died before it wrote down that
it had sent it) and it may be lost (the broker lost its memory): then the job is still there, its
message is still in the outbox, and it is sent again when more jobs wait than messages do.

Messages go out in the order of `service.store.queues`, to the queue named after what the job needs,
and a few at a time only: a job of a higher priority that comes later is not behind all the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kombu.connection import Connection
from kombu.exceptions import ChannelError, OperationalError

from service.settings import Settings
from service.store import QUEUES, Store, StoreUnavailable
from worker import log
from worker.reconcile import reconcile_forever
from worker.tasks import app, run_job


def run_relay(store: Store, settings: Settings, stop: threading.Event) -> None:
    """Sends messages, and reconciles, until `stop` is set."""
    reconciler = threading.Thread(target=reconcile_forever, args=(store, settings, stop))
    reconciler.start()
    quiet, looked = True, time.monotonic()
    while not stop.is_set():
        try:
            relay(store, settings.relay_window)
            if time.monotonic() - looked > settings.reconcile_seconds:
                looked = time.monotonic()
                resend(store, settings.resend_seconds)
            quiet = True
        except (StoreUnavailable, OperationalError, OSError) as error:
            if quiet:
                log.warning("cannot relay, trying on", because=error)
            quiet = False
        except Exception:  # this thread must not end while the process seems to live
            log.exception("relaying failed")
        stop.wait(settings.poll_seconds)
    reconciler.join()


def relay(store: Store, window: int) -> int:
    """Sends the messages whose turn it is, at most `window` of a queue that nobody has answered
    yet; how many that were."""
    count = 0
    while (found := store.next_message(window)) is not None:
        message, queue = found
        with _explained():
            run_job.apply_async(args=[message.job_id], queue=queue)
        store.mark_sent(message)
        log.info("message sent", job=message.job_id, queue=queue)
        count += 1
    return count


def resend(store: Store, after_seconds: float) -> None:
    """Puts messages that the broker has lost up for sending again.

    Its queue need not be empty: under load it never is, and a lost message must not wait for that.
    """
    if count := store.resend_unclaimed(after_seconds, queue_lengths()):
        log.warning("messages were lost, sending again", count=count)


def queue_lengths() -> dict[str, int]:
    """Messages that wait at the broker, by queue; raises OperationalError if it cannot be asked."""
    with _explained(), app.connection_for_read() as connection:
        connection.ensure_connection(max_retries=1, timeout=5)
        return {queue: _length(connection, queue) for queue in QUEUES}


@contextmanager
def _explained() -> Iterator[None]:
    """Raises OperationalError, whatever the broker's client may raise in the block.

    kombu translates most of it and lets some through: what the server answers instead of a length,
    and what goes wrong as a connection is closed. It counts KeyError among them, so the block must
    hold nothing else.
    """
    broker = app.connection_for_write()  # only a description, nothing is connected
    try:
        yield
    except OperationalError:
        raise
    except (*broker.connection_errors, *broker.channel_errors) as error:
        raise OperationalError(f"{type(error).__name__}: {error}") from error


def _length(connection: Connection, queue: str) -> int:
    with connection.channel() as channel:  # type: ignore[no-untyped-call]
        try:
            return int(channel.queue_declare(queue, passive=True).message_count)
        except ChannelError:
            return 0  # Redis forgets an empty list
