"""When a job that broke down may be tried again.

Only adds: a column without a value. The version before goes on working beside it, and tries such
jobs again at once, as it did.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006_backoff"
down_revision = "0005_aliases"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # no table is rewritten for a column without a value
    op.add_column("jobs", sa.Column("not_before", sa.Double(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "not_before")
