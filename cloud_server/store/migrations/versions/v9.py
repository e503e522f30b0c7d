"""Rounds know whose updates were left out, for whoever asks later; a device's greeting says of which start it is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "9"
down_revision = "8"


def upgrade() -> None:
    op.add_column("rounds", sa.Column("left_out", sa.JSON, nullable=False, server_default="[]"))
    devices = sa.table("devices", sa.column("run"), sa.column("participant"), sa.column("hello", sa.JSON))
    connection = op.get_bind()
    for run, participant, hello in connection.execute(sa.select(*devices.c)).all():
        start = {"boot": hello.pop("boot"), "nonce": "0" * 16}  # of no process: the next greeting is another's
        where = devices.c.run == run, devices.c.participant == participant
        connection.execute(devices.update().where(*where).values(hello={**hello, "start": start}))
