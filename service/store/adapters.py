"""Trained adapters under their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from service.store.database import Database, clean
from service.store.errors import NotFound
from service.store.models import AdapterRow, AliasRow, JobRow

STUDENT = "-student"
"""Ends the name of the student without its teacher: `JOB@20-student`, `JOB@best-student`."""

AdapterStatus = Literal["registered", "ready", "failed"]
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
"""Steps as they are written; Python would refuse to read one of thousands of digits."""


class Adapters(Database):
    """The part of the store that generation works with."""

    def adapters_named(self, names: Sequence[str]) -> list[AdapterRow]:
        """Those of these adapters, by their immutable names, that there are."""
        with self.read() as session:
            return list(session.scalars(select(AdapterRow).where(AdapterRow.name.in_(names))))

    def aliases(self) -> list[AliasRow]:
        """Every alias, by name."""
        with self.read() as session:
            return list(session.scalars(select(AliasRow).order_by(AliasRow.name)))

    def set_alias(self, name: str, adapter: str) -> AliasRow:
        """Lets `name` mean the adapter that `adapter` means now; raises NotFound. Whether the name
        may be an alias is the caller's to know."""
        with self.write() as session:
            found = _named(session, adapter)
            now = datetime.now(UTC)
            alias = session.get(AliasRow, name)
            if alias is None:
                alias = AliasRow(name=name, created_at=now)
                session.add(alias)
            alias.adapter, alias.updated_at = found.name, now
            return alias

    def delete_alias(self, name: str) -> None:
        """Forgets the alias; raises NotFound. The adapter stays."""
        with self.write() as session:
            if (alias := session.get(AliasRow, name)) is None:
                raise NotFound("alias", name)
            session.delete(alias)

    def adapters(
        self, job_id: str | None = None, after: str | None = None, limit: int = 100
    ) -> tuple[list[AdapterRow], bool]:
        """Adapters, those of newer jobs and of later steps first, and whether there are more.

        `after` is the name of the last one of the page before; raises NotFound if there is none.
        """
        query = select(AdapterRow)
        if job_id is not None:
            query = query.where(AdapterRow.job_id == job_id)
        order = (AdapterRow.job_id.desc(), AdapterRow.step.desc(), AdapterRow.name)
        query = query.order_by(*order).limit(limit + 1)
        with self.read() as session:
            if after is not None:
                last = _named(session, after)
                query = query.where(AdapterRow.job_id <= last.job_id)  # where the index is entered
                query = query.where(
                    (AdapterRow.job_id < last.job_id)
                    | ((AdapterRow.job_id == last.job_id) & (AdapterRow.step < last.step))
                    | (
                        (AdapterRow.job_id == last.job_id)
                        & (AdapterRow.step == last.step)
                        & (AdapterRow.name > last.name)
                    )
                )
            rows = session.scalars(query).all()
        return list(rows[:limit]), len(rows) > limit

    def adapter(self, name: str) -> AdapterRow:
        """The adapter that `JOB@STEP`, `JOB@best`, `JOB@latest` or `JOB` means.

        `JOB` is the best one where accuracy was measured, else the newest. What follows the @ may
        end in `-student`, for the student without its teacher. Raises NotFound with a
        sentence that says what is missing: the job, any adapter of it, or this one.
        """
        with self.read() as session:
            return _named(session, name)

    def mark_adapter(
        self, adapter: AdapterRow, status: AdapterStatus, error: str | None = None
    ) -> bool:
        """Notes that the adapter has answered, or why it cannot. False, and nothing noted, where
        the name is gone or means other weights by now."""
        with self.write() as session:
            row = session.get(AdapterRow, adapter.name)
            if row is None or row.sha256 != adapter.sha256:
                return False
            row.status, row.error = status, clean(error)
            return True


def _named(session: Session, name: str) -> AdapterRow:
    if "@" not in name and (alias := session.get(AliasRow, name)) is not None:
        name = alias.adapter
    job_id, _, which = name.partition("@")
    immutable = _STEP.fullmatch(which.removesuffix(STUDENT))
    if immutable and (exact := session.scalar(_EXACT, {"name": name})) is not None:
        return exact
    job = session.get(JobRow, job_id)
    if job is None or job.deleted_at is not None:
        raise NotFound("adapter", name, f"there is no adapter {name!r}: no job {job_id!r}")
    suffix = STUDENT if which.endswith(STUDENT) else ""
    step = _step(job, which.removesuffix(STUDENT), name)
    if step is None:
        raise NotFound(
            "adapter", name, f"job {job_id} ({job.status}) has no adapter yet: none was saved"
        )
    adapter = session.get(AdapterRow, f"{job_id}@{step}{suffix}")
    if adapter is None:
        rows = session.scalars(
            select(AdapterRow.name)
            .where(AdapterRow.job_id == job_id)
            .order_by(AdapterRow.step, AdapterRow.name)
        ).all()
        known = ", ".join(row.partition("@")[2] for row in rows) or "none"
        raise NotFound("adapter", name, f"there is no adapter {name!r}; saved: {known}")
    return adapter


_EXACT = (
    select(AdapterRow)
    .join(JobRow, JobRow.id == AdapterRow.job_id)
    .where(AdapterRow.name == bindparam("name"))
    .where(JobRow.deleted_at.is_(None), JobRow.checkpoint_step.is_not(None))
)
"""The adapter of an immutable name: what is asked for most often, in one query."""


def _step(job: JobRow, which: str, name: str) -> int | None:
    """The step that the part after the @ means; None if the job has no adapter at all."""
    if job.checkpoint_step is None:
        return None
    if which == "latest":
        return job.checkpoint_step
    if which == "best" and job.best_step is None:
        raise NotFound(
            "adapter",
            name,
            f"job {job.id} has no best adapter: no accuracy was measured; "
            f"{job.id}@latest is step {job.checkpoint_step}",
        )
    if which in ("", "best"):
        return job.best_step if job.best_step is not None else job.checkpoint_step
    if _STEP.fullmatch(which):
        return int(which)
    raise NotFound(
        "adapter", name, f"there is no adapter {name!r}: after the @ stands a step, best or latest"
    )
