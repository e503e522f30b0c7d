"""Runs have an id beside their name; devices know those that there are by their names."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "10"
down_revision = "9"


def upgrade() -> None:
    op.add_column("runs", sa.Column("id", sa.String, nullable=False, server_default=""))
    runs = sa.table("runs", sa.column("name"), sa.column("id"))
    op.execute(runs.update().values(id=runs.c.name))
