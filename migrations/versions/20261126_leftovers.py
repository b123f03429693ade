"""When a job that broke down may be tried again, and what nobody names in the artifact store.

Only adds: a column without a value and a table. The version before goes on working beside it: it
tries such jobs again at once, and leaves such remains, as it did.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006_leftovers"
down_revision = "0005_aliases"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # no table is rewritten for a column without a value
    op.add_column("jobs", sa.Column("not_before", sa.Double(), nullable=True))
    op.create_table(
        "remains",
        sa.Column("prefix", sa.String(), nullable=False),
        sa.Column("noted_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("prefix", name=op.f("pk_remains")),
    )


def downgrade() -> None:
    op.drop_table("remains")
    op.drop_column("jobs", "not_before")
