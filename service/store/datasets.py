"""Uploaded datasets. The rows lie in files; here is what is known about them."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import select

from service.store.database import Database, clean
from service.store.errors import NotFound
from service.store.ids import new_id
from service.store.models import DatasetRow


class Datasets(Database):
    """The part of the store that uploads work with."""

    def add_dataset(
        self,
        *,
        name: str,
        filename: str,
        rows: int,
        with_solution: int,
        bytes: int,
        sha256: str,
        id: str | None = None,
    ) -> DatasetRow:
        """Registers a dataset under `id`, or under a new one (`ds_…`)."""
        dataset = DatasetRow(
            id=id or new_id("ds"),
            name=clean(name),
            filename=clean(filename),
            rows=rows,
            with_solution=with_solution,
            bytes=bytes,
            sha256=sha256,
            created_at=datetime.now(UTC),
        )
        with self.write() as session:
            session.add(dataset)
        return dataset

    def get_dataset(self, dataset_id: str) -> DatasetRow:
        """The dataset; raises NotFound."""
        with self.read() as session:
            dataset = session.get(DatasetRow, dataset_id)
        if dataset is None:
            raise NotFound("dataset", dataset_id)
        return dataset

    def list_datasets(
        self, after: str | None = None, limit: int = 20
    ) -> tuple[list[DatasetRow], bool]:
        """Datasets, newest first, and whether there are more."""
        query = select(DatasetRow).order_by(DatasetRow.id.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(DatasetRow.id < after)
        with self.read() as session:
            rows = session.scalars(query).all()
        return list(rows[:limit]), len(rows) > limit
