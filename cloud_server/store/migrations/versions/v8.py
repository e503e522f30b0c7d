"""Complaints about a device are counted, for whoever asks later."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "8"
down_revision = "7"


def upgrade() -> None:
    op.add_column("devices", sa.Column("complaints", sa.JSON, nullable=False, server_default="{}"))
