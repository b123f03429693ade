"""The Celery app: one task, `run_job(job_id)`.

    celery -A worker.tasks worker                 what its GPUs can serve, or BRIDGE_QUEUES
    celery -A worker.tasks worker -Q gpu,gpu:2    these queues alone

A message is a hint that a job waits; it carries the job's id and nothing else. It is acknowledged
when it is taken: what a lost worker leaves undone comes back through the database, not the broker.
A worker that hears no more messages looks into the database itself (`lookout.py`).
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from celery import Celery, signals
from kombu.entity import Exchange, Queue

from service.settings import get_settings
from service.store import Store
from service.variables import unknown
from worker import log
from worker.execute import execute_job
from worker.gpus import Gpus
from worker.lookout import Slots, look_out
from worker.presence import worker_name
from worker.serving import announced, lease_of

app = Celery("bridge", broker=get_settings().redis_url, set_as_current=False)
app.conf.update(
    task_default_queue="any",
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
_serving = ExitStack()
_slots = Slots(get_settings().worker_slots)


@lru_cache(maxsize=1)
def _store() -> Store:
    return Store.from_settings()


@lru_cache(maxsize=1)
def _gpus() -> Gpus:
    return Gpus.of(get_settings())


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
        holds=_gpus(),
    )


@signals.celeryd_init.connect  # type: ignore[untyped-decorator]
def _on_init(conf: Any, **_: Any) -> None:
    """What a worker serves unless `-Q` says so. Only a worker looks for GPUs, not the relay."""
    conf.task_queues = [
        Queue(name, Exchange(name), name)  # type: ignore[no-untyped-call]
        for name in _gpus().queues
    ]


@signals.worker_ready.connect  # type: ignore[untyped-decorator]
def _on_ready(sender: Any, **_: Any) -> None:
    gpus, settings = _gpus(), get_settings()
    gpus.queues = tuple(sender.app.amqp.queues.consume_from)
    _serving.enter_context(
        announced(
            _store(),
            _NAME,
            gpus.queues,
            gpus=len(gpus.ids),
            slots=sender.controller.concurrency,
            lease=lease_of(settings),
        )
    )
    _slots.limit(sender.controller.concurrency)  # --concurrency comes before the setting
    look_out(_store, f"{_NAME}:lookout", gpus, settings, _slots, _stop, _run)


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _on_shutdown(**_: Any) -> None:
    """SIGTERM: Celery waits for its tasks; this tells the engines to save and leave."""
    _stop.set()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _on_left(**_: Any) -> None:
    """Celery knows nothing of jobs that we found by ourselves."""
    _slots.wait_until_free(get_settings().grace_seconds * 2)
    _serving.close()


@signals.setup_logging.connect  # type: ignore[untyped-decorator]
def _on_logging(**_: Any) -> None:
    log.setup()
    for sentence in unknown(os.environ):
        log.warning(sentence)
