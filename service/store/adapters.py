"""Trained adapters under their names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import (
    ColumnElement,
    Select,
    SQLColumnExpression,
    String,
    bindparam,
    cast,
    func,
    literal,
    select,
)
from sqlalchemy.orm import Session, aliased

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
    job_id, _, which = name.partition("@")
    suffix = STUDENT if which.endswith(STUDENT) else ""
    which = which.removesuffix(STUDENT)
    query = _BY_STEP if _STEP.fullmatch(which) else _BY_WORD.get(which)
    given = {"name": name, "job": job_id, "suffix": suffix}
    if query is not None and (found := session.scalar(query, given)) is not None:
        return found
    raise _not_found(session, name)


def _meant(name: ColumnElement[str]) -> Select[AdapterRow]:
    """The adapter of an immutable name, in one query: every request asks."""
    return (
        select(AdapterRow)
        .join(JobRow, JobRow.id == AdapterRow.job_id)
        .where(AdapterRow.name == name)
        .where(JobRow.deleted_at.is_(None), JobRow.checkpoint_step.is_not(None))
    )


_job = aliased(JobRow)
_BEST_OR_NEWEST = func.coalesce(_job.best_step, _job.checkpoint_step)


def _of_job(step: SQLColumnExpression[int | None] | SQLColumnExpression[int]) -> ColumnElement[str]:
    """The immutable name that the job's name means with this step."""
    name = _job.id + literal("@") + cast(step, String) + bindparam("suffix", type_=String)
    return select(name).where(_job.id == bindparam("job")).scalar_subquery()


_ALIAS = select(AliasRow.adapter).where(AliasRow.name == bindparam("name")).scalar_subquery()
_BY_STEP = _meant(bindparam("name", type_=String))
_BY_WORD = {
    "": _meant(func.coalesce(_ALIAS, _of_job(_BEST_OR_NEWEST))),
    "best": _meant(_of_job(_job.best_step)),
    "latest": _meant(_of_job(_job.checkpoint_step)),
}
"""By what stands behind the @."""


def _not_found(session: Session, name: str) -> NotFound:
    """What is missing: the job, any adapter of it, or this one."""
    if "@" not in name and (alias := session.get(AliasRow, name)) is not None:
        name = alias.adapter
    job_id, _, which = name.partition("@")
    job = session.get(JobRow, job_id)
    if job is None or job.deleted_at is not None:
        return NotFound("adapter", name, f"there is no adapter {name!r}: no job {job_id!r}")
    if job.checkpoint_step is None:
        return NotFound(
            "adapter", name, f"job {job_id} ({job.status}) has no adapter yet: none was saved"
        )
    which = which.removesuffix(STUDENT)
    if which == "best" and job.best_step is None:
        return NotFound(
            "adapter",
            name,
            f"job {job_id} has no best adapter: no accuracy was measured; "
            f"{job_id}@latest is step {job.checkpoint_step}",
        )
    if which not in _BY_WORD and not _STEP.fullmatch(which):
        return NotFound(
            "adapter",
            name,
            f"there is no adapter {name!r}: after the @ stands a step, best or latest",
        )
    rows = session.scalars(
        select(AdapterRow.name)
        .where(AdapterRow.job_id == job_id)
        .order_by(AdapterRow.step, AdapterRow.name)
    ).all()
    known = ", ".join(row.partition("@")[2] for row in rows) or "none"
    return NotFound("adapter", name, f"there is no adapter {name!r}; saved: {known}")
