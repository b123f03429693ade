"""Projects with quotas, queues by capability, priorities, live workers, retries and forks.

Only adds: columns with a default or without a value, which neither database rewrites a table for,
and tables. The version before goes on working beside it. On Postgres the indexes of the large
tables are built without locking them, outside of a transaction, so each statement may be run again
after a failure.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002_control"
down_revision = "0001"
branch_labels = None
depends_on = None

JOBS = {  # type and default
    "project_id": (sa.String, "default"),
    "queue": (sa.String, "any"),
    "priority": (sa.Integer, "0"),
    "claimed_at": (sa.Double, None),
    "gpus_held": (sa.Integer, "0"),
    "retries": (sa.Integer, "0"),
    "retried_seq": (sa.BigInteger, "0"),
    "forked_from": (sa.String, None),
    "forked_step": (sa.Integer, None),
}
QUEUED = sa.text("status = 'queued'")


def upgrade() -> None:
    postgres = op.get_bind().dialect.name == "postgresql"
    again = {"if_not_exists": True} if postgres else {}
    op.create_table(
        "projects",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("max_running", sa.Integer(), nullable=True),
        sa.Column("gpu_hours", sa.Double(), nullable=True),
        sa.Column("gpu_seconds_used", sa.Double(), nullable=False, server_default=sa.text("0")),
        sa.Column("served_at", sa.Double(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
        if_not_exists=True,
    )
    op.execute(
        "INSERT INTO projects (id, name, created_at) "
        "VALUES ('default', 'Default project', CURRENT_TIMESTAMP) ON CONFLICT DO NOTHING"
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("queues", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("gpus", sa.Integer(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
        if_not_exists=True,
    )
    for name, (kind, default) in JOBS.items():
        column = sa.Column(name, kind(), nullable=default is None, server_default=default)
        op.add_column("jobs", column, **again)
    op.add_column("outbox", sa.Column("not_before", sa.Double(), nullable=True), **again)
    op.add_column(
        "attempts",
        sa.Column("gpus", sa.Integer(), nullable=False, server_default=sa.text("0")),
        **again,
    )
    if not postgres:
        create_indexes()
        return
    with op.get_context().autocommit_block():
        # Neither waits in anybody's way: a build that takes long, or that waits for others, may.
        op.execute("SET lock_timeout = 0")
        op.execute("SET statement_timeout = 0")
        drop_indexes(
            postgresql_concurrently=True
        )  # what a build that was broken off has left is not used, and not valid
        create_indexes()
        op.execute("RESET lock_timeout")
        op.execute("RESET statement_timeout")


def create_indexes() -> None:
    op.create_index(
        "ix_jobs_project_id_id", "jobs", ["project_id", "id"], postgresql_concurrently=True
    )
    op.create_index(
        "ix_jobs_waiting",
        "jobs",
        ["project_id", "queue", "priority", "id"],
        sqlite_where=QUEUED,
        postgresql_where=QUEUED,
        postgresql_concurrently=True,
    )


def drop_indexes(**options: bool) -> None:
    for name in ("ix_jobs_waiting", "ix_jobs_project_id_id"):
        op.drop_index(name, table_name="jobs", if_exists=True, **options)


def downgrade() -> None:
    """Jobs that are paused would be lost to the version before: they are queued again first."""
    op.execute(
        "INSERT INTO outbox (job_id, created_at) "
        "SELECT id, CURRENT_TIMESTAMP FROM jobs WHERE status = 'paused'"
    )
    op.execute("UPDATE jobs SET status = 'queued', wanted = 'run' WHERE status = 'paused'")
    op.execute("UPDATE jobs SET status = 'running', wanted = 'run' WHERE status = 'pausing'")
    drop_indexes()
    op.drop_column("attempts", "gpus")
    op.drop_column("outbox", "not_before")
    for name in reversed(JOBS):
        op.drop_column("jobs", name)
    op.drop_table("workers")
    op.drop_table("projects")
