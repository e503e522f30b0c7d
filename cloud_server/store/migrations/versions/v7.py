"""Steps are counted, so that one whose answer was lost is not written twice."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "7"
down_revision = "6"


def upgrade() -> None:
    whole = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.add_column("runs", sa.Column("steps", whole, nullable=False, server_default="0"))
