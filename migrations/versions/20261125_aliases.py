"""Users' own names for adapters."""

import sqlalchemy as sa
from alembic import op

revision = "0005_aliases"
down_revision = "0004_artifacts"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "aliases",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("adapter", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter"],
            ["adapters.name"],
            name=op.f("fk_aliases_adapter"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_aliases")),
    )
    op.create_index("ix_aliases_adapter", "aliases", ["adapter"])


def downgrade() -> None:
    op.drop_table("aliases")
