"""Messages about waiting jobs, on their way to a broker.

A row is written in the transaction that queues its job and deleted by the one that takes the job
out of the queue, so every queued job has exactly one. Only a few are sent at a time: what lies at
the broker comes in the order it was sent, and a job of a higher priority should not have to wait
behind a thousand others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, delete, func, select, update
from sqlalchemy.orm import Session

from service.store.database import Database, epoch_now, long_ago
from service.store.models import JobRow, OutboxRow, WorkerRow
from service.store.queues import NEEDS, QUEUES, next_queued


class Outbox(Database):
    """The part of the store that the relay works with."""

    def next_message(self, window: int) -> tuple[OutboxRow, str] | None:
        """The message to be sent next, and the queue to send it to; None if no job may run now.

        A queue has room while fewer than `window` messages of it have been sent that no worker has
        answered by a claim. One that no live worker serves gets none: a job that was told of
        counts as under way, and would hold back others of its project for nothing.
        """
        sent = (
            select(JobRow.queue, func.count())
            .join(OutboxRow, OutboxRow.job_id == JobRow.id)
            .where(OutboxRow.sent_at.is_not(None))
            .group_by(JobRow.queue)
        )
        with self.read() as session:
            waiting = dict(session.execute(sent).all())
            served = _served(session)
            room = {
                queue: gpus or 0
                for queue, gpus in NEEDS.items()
                if queue in served and waiting.get(queue, 0) < window
            }
            job_id = session.scalar(next_queued(room, unsent=True)) if room else None
            if job_id is None:
                return None
            query = select(OutboxRow, JobRow.queue).join(JobRow, JobRow.id == OutboxRow.job_id)
            row = session.execute(query.where(OutboxRow.job_id == job_id)).first()
            return None if row is None else (row[0], row[1])

    def outbox_batch(self, limit: int = 100) -> list[OutboxRow]:
        """Messages that are yet to be sent, oldest first, whether their turn has come or not."""
        unsent = select(OutboxRow).where(OutboxRow.sent_at.is_(None))
        with self.read() as session:
            return list(session.scalars(unsent.order_by(OutboxRow.id).limit(limit)))

    def mark_sent(self, message: OutboxRow) -> None:
        """The message went out. It is kept until its job is claimed.

        One that a worker has declined meanwhile stays to be sent again.
        """
        as_it_was = (
            OutboxRow.id == message.id,
            OutboxRow.job_id == message.job_id,
            OutboxRow.not_before.is_not_distinct_from(message.not_before),
        )
        with self.write() as session:
            session.execute(update(OutboxRow).where(*as_it_was).values(sent_at=datetime.now(UTC)))

    def resend_unclaimed(
        self, older_than_seconds: float, at_broker: Mapping[str, int] | None = None
    ) -> int:
        """Puts messages that were sent so long ago, and whose job still waits, up for sending
        again; returns how many.

        Only if some of their queue were lost: if more jobs wait for their message to arrive than
        the broker holds messages (`at_broker`, counted before this call), or nobody serves it any
        more. Which of them is lost cannot be told, so all the old ones go out again; a message too
        many does no harm.
        """
        lost = long_ago(OutboxRow.sent_at, older_than_seconds)
        with self.read() as session:
            if session.scalar(select(OutboxRow.id).where(lost).limit(1)) is None:
                return 0
            served = _served(session)
        at_broker, count = at_broker or {}, 0
        for queue in QUEUES:
            # The young ones count here too: they may be all that the broker holds.
            sent = select(func.count()).select_from(OutboxRow).where(_sent(queue))
            with self.read() as session:
                if queue in served and (session.scalar(sent) or 0) <= at_broker.get(queue, 0):
                    continue
            with self.write() as session:
                again = update(OutboxRow).where(lost, _of(queue)).values(sent_at=None)
                count += len(session.scalars(again.returning(OutboxRow.id)).all())
        return count


def _served(session: Session) -> set[str]:
    """The queues that live workers serve; all of them where no worker has said so yet."""
    alive = select(WorkerRow.queues).where(WorkerRow.expires_at >= epoch_now())
    return {queue for queues in session.scalars(alive) for queue in queues} or set(QUEUES)


def announce(session: Session, job_id: str) -> None:
    """Writes the message about a job that now waits."""
    session.add(OutboxRow(job_id=job_id, created_at=datetime.now(UTC)))


def forget_messages(session: Session, job_ids: Sequence[str]) -> None:
    """Deletes the jobs' messages: they have been understood, or nobody needs to hear them."""
    session.execute(delete(OutboxRow).where(OutboxRow.job_id.in_(job_ids)))


def _of(queue: str) -> ColumnElement[bool]:
    jobs = select(JobRow.id).where(JobRow.id == OutboxRow.job_id, JobRow.queue == queue)
    return jobs.exists()


def _sent(queue: str) -> ColumnElement[bool]:
    return OutboxRow.sent_at.is_not(None) & _of(queue)
