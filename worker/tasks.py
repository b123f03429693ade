"""The Celery app: one task, `run_job(job_id)`.

    celery -A worker.tasks worker

A message is a hint that a job waits; it carries the job's id and nothing else. It is acknowledged
when it is taken: what a lost worker leaves undone comes back through the database, not the broker.
A worker that hears no more messages looks into the database itself (`lookout.py`).
"""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

from celery import Celery, signals

from service.settings import get_settings
from service.store import Store
from worker import log
from worker.execute import execute_job
from worker.lookout import Slots, look_out
from worker.presence import worker_name

QUEUE = "bridge"

app = Celery("bridge", broker=get_settings().redis_url, set_as_current=False)
app.conf.update(
    task_default_queue=QUEUE,
    task_acks_late=False,
    task_ignore_result=True,
    task_publish_retry=False,  # the relay tries again by itself
    task_serializer="json",
    accept_content=["json"],
    # A message that waits in a busy worker is one that a free worker cannot have.
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    # A slot only supervises a process: a thread is enough, and it hears SIGTERM when we do.
    worker_pool="threads",
    worker_concurrency=get_settings().worker_slots,
    worker_enable_remote_control=True,
    broker_connection_retry_on_startup=True,
)

_NAME = worker_name()
_stop = threading.Event()
_slots = Slots(get_settings().worker_slots)


@lru_cache(maxsize=1)
def _store() -> Store:
    return Store.from_settings()


@app.task(name="run_job")  # type: ignore[untyped-decorator]
def run_job(job_id: str) -> None:
    """Runs the job if it still waits; a message too many does nothing.

    If the database cannot be reached the message is lost, and the relay sends another one. So it is
    where the last free slot has gone to a job that the worker found by itself, and where the worker
    leaves.
    """
    _slots.heard()
    if _stop.is_set():
        return
    with _slots.taken() as free:
        if free:
            _run(job_id)
        else:
            log.warning("no slot is free, message dropped", job=job_id)


def _run(job_id: str) -> None:
    execute_job(
        job_id,
        store=_store(),
        settings=get_settings(),
        worker_id=f"{_NAME}:{threading.current_thread().name}",
        stop=_stop,
    )


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def _on_ready(sender: Any = None, **_: Any) -> None:
    _slots.limit(sender.controller.concurrency)  # --concurrency comes before the setting
    look_out(_store, get_settings(), _slots, _stop, _run)


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _on_shutdown(**_: Any) -> None:
    """SIGTERM: Celery waits for its tasks; this tells the engines to save and leave."""
    _stop.set()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _on_left(**_: Any) -> None:
    """Celery knows nothing of jobs that we found by ourselves."""
    _slots.wait_until_free(get_settings().grace_seconds * 2)


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _on_logging(**_: Any) -> None:
    log.setup()
