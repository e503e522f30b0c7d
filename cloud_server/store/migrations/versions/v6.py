"""The tables of version 6, which stores had before they had migrations: those are taken over as they are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "6"
down_revision = None

WHOLE = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "runs",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("config", sa.LargeBinary, nullable=False),
        sa.Column("started_s", sa.Float, nullable=False),
        sa.Column("finished_s", sa.Float),
        sa.Column("epoch", WHOLE, nullable=False),
        sa.Column("state", sa.String, nullable=False),
    )
    op.create_table(
        "devices",
        _run(),
        _number("participant"),
        sa.Column("device", sa.String, nullable=False),
        sa.Column("hello", sa.JSON, nullable=False),
        sa.Column("seen_s", sa.Float, nullable=False),
        sa.Column("doubled_s", sa.Float),
        sa.UniqueConstraint("run", "device"),
    )
    op.create_table(
        "rounds",
        _run(),
        _number("stage"),
        _number("round"),
        sa.Column("chosen", sa.JSON, nullable=False),
        sa.Column("begun_s", sa.Float, nullable=False),
        sa.Column("closed_s", sa.Float),
        sa.Column("calibration_loss", sa.Float),
        sa.Column("calibration_seconds", sa.Float),
    )
    op.create_table(
        "contributions",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("run", sa.String, sa.ForeignKey("runs.name"), nullable=False),
        sa.Column("stage", sa.Integer, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("participant", sa.Integer, nullable=False),
        sa.Column("blob", sa.String, nullable=False),
        *(sa.Column(name, WHOLE, nullable=False) for name in ("bytes", "images")),
        *(sa.Column(name, sa.Float, nullable=False) for name in ("loss", "peak_mb", "baseline_mb")),
        *(sa.Column(name, WHOLE, nullable=False) for name in ("down_bytes", "up_bytes")),
        *(sa.Column(name, sa.Float, nullable=False) for name in ("seconds", "received_s")),
        sa.Column("report", sa.JSON, nullable=False),
        sa.UniqueConstraint("stage", "round", "participant", "run"),
        sa.ForeignKeyConstraint(["run", "participant"], ["devices.run", "devices.participant"]),
        sa.ForeignKeyConstraint(["run", "stage", "round"], ["rounds.run", "rounds.stage", "rounds.round"]),
    )
    op.create_table(
        "evaluations",
        _run(),
        _number("stage"),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("knn", sa.Float, nullable=False),
        sa.Column("probe", sa.Float),
        sa.Column("metrics", sa.JSON, nullable=False),
    )
    op.create_table(
        "judgements",
        _run(),
        _number("stage"),
        _number("attempt"),
        sa.Column("collapsed", sa.Boolean, nullable=False),
        sa.Column("spread", sa.Float, nullable=False),
        sa.Column("rank", sa.Float, nullable=False),
    )
    op.create_table("checkpoints", _run(), _number("stage"), _number("round"), sa.Column("parts", sa.JSON, nullable=False))


def _run() -> sa.Column[str]:
    return sa.Column("run", sa.String, sa.ForeignKey("runs.name"), primary_key=True)


def _number(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.Integer, primary_key=True, autoincrement=False)
