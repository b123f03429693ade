"""From the outbox to the broker: tells Celery's workers which jobs wait.

A message is sent at least once. It may be sent twice (this process died before it wrote down that
it had sent it) and it may be lost (the broker lost its memory): then the job is still there, its
message is still in the outbox, and it is sent again when more jobs wait than messages do.
"""

from __future__ import annotations

import threading
import time

from kombu.exceptions import ChannelError, OperationalError

from service.settings import Settings
from service.store import Store, StoreUnavailable
from worker import log
from worker.reconcile import reconcile_forever
from worker.tasks import QUEUE, app, run_job


def run_relay(store: Store, settings: Settings, stop: threading.Event) -> None:
    """Sends messages, and reconciles, until `stop` is set."""
    reconciler = threading.Thread(target=reconcile_forever, args=(store, settings, stop))
    reconciler.start()
    quiet, looked = True, time.monotonic()
    while not stop.is_set():
        try:
            relay(store)
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


def relay(store: Store) -> int:
    """Sends what the outbox holds; how many messages that were."""
    batch = store.outbox_batch()
    for message in batch:
        run_job.apply_async(args=[message.job_id])
        store.mark_sent([message.id])
        log.info("message sent", job=message.job_id)
    return len(batch)


def resend(store: Store, after_seconds: float) -> None:
    """Puts messages that the broker has lost up for sending again.

    Its queue need not be empty: under load it never is, and a lost message must not wait for that.
    """
    if count := store.resend_unclaimed(after_seconds, queue_length()):
        log.warning("messages were lost, sending again", count=count)


def queue_length() -> int:
    """Messages that wait at the broker; raises OperationalError if it cannot be asked."""
    with app.connection_for_read() as connection:
        connection.ensure_connection(max_retries=1, timeout=5)
        try:
            return int(connection.default_channel.queue_declare(QUEUE, passive=True).message_count)
        except ChannelError:
            return 0  # Redis forgets an empty list
        except connection.connection_errors as error:
            # kombu lets the client's own error through here, which is no OSError
            raise OperationalError(str(error)) from error
