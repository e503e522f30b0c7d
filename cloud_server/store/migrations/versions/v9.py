"""Rounds know whose updates were left out, for whoever asks later."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "9"
down_revision = "8"


def upgrade() -> None:
    op.add_column("rounds", sa.Column("left_out", sa.JSON, nullable=False, server_default="[]"))
