"""What lies in the artifact store, and jobs that are being deleted.

Only adds: a table and a column without a value. The version before goes on working beside it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004_artifacts"
down_revision = "0003_rollups"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "artifacts",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("fk_artifacts_job_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("job_id", "path", name=op.f("pk_artifacts")),
    )
    # no table is rewritten for a column without a value
    op.add_column("jobs", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    # The version before would show them again, half removed as they are.
    op.execute("DELETE FROM jobs WHERE deleted_at IS NOT NULL")
    op.drop_column("jobs", "deleted_at")
    op.drop_table("artifacts")
