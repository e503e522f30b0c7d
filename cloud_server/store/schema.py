"""The tables of the server's store. A change of them is a new HEAD, and a file in `migrations/versions`."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

FIRST = "6"  # the oldest that is taken over, as SQLite's user_version; from then on the revisions of Alembic
HEAD = "10"

metadata = MetaData()
version = Table("lwfed_version", MetaData(), Column("version_num", String(32), primary_key=True))  # Alembic's, under a name of ours

Whole = BigInteger().with_variant(Integer, "sqlite")  # 64 bits on either


def _run(primary_key: bool = True) -> Column[str]:
    return Column("run", String, ForeignKey("runs.name"), primary_key=primary_key, nullable=False)


runs = Table(
    "runs",
    metadata,
    Column("name", String, primary_key=True),
    Column("config", LargeBinary, nullable=False),  # RunConfig.to_bytes
    Column("started_s", Float, nullable=False),  # Unix time, as all times here
    Column("finished_s", Float),
    Column("epoch", Whole, nullable=False),  # of the last start of the server: grows with every start, also of other stores
    Column("state", String, nullable=False),  # of the coordinator, JSON
    Column("id", String, nullable=False, server_default=""),  # by which devices know the run: another one of the name has another
    Column("steps", Whole, nullable=False, server_default="0"),  # that were written: tells whether one whose answer was lost is among them
)

devices = Table(
    "devices",
    metadata,
    _run(),
    Column("participant", Integer, primary_key=True, autoincrement=False),  # by order of admission, from 0
    Column("device", String, nullable=False),
    Column("hello", JSON, nullable=False),
    Column("seen_s", Float, nullable=False),
    Column("doubled_s", Float),  # when two agents last spoke with its identity
    Column("complaints", JSON, nullable=False, server_default="{}"),  # code -> how often the server had to complain, over the run
    UniqueConstraint("run", "device"),
)

rounds = Table(
    "rounds",
    metadata,
    _run(),
    Column("stage", Integer, primary_key=True, autoincrement=False),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("chosen", JSON, nullable=False),  # participants
    Column("begun_s", Float, nullable=False),
    Column("closed_s", Float),
    Column("calibration_loss", Float),
    Column("calibration_seconds", Float),
    Column("left_out", JSON, nullable=False, server_default="[]"),  # participants whose updates came and were not chosen to count
)

contributions = Table(
    "contributions",
    metadata,
    Column("id", String, primary_key=True),
    _run(primary_key=False),
    Column("stage", Integer, nullable=False),
    Column("round", Integer, nullable=False),
    Column("participant", Integer, nullable=False),
    Column("blob", String, nullable=False),
    Column("bytes", Whole, nullable=False),
    Column("images", Whole, nullable=False),
    Column("loss", Float, nullable=False),  # of the last local epoch
    Column("peak_mb", Float, nullable=False),
    Column("baseline_mb", Float, nullable=False),
    Column("down_bytes", Whole, nullable=False),  # since the device joined the run
    Column("up_bytes", Whole, nullable=False),
    Column("seconds", Float, nullable=False),  # that the device computed
    Column("received_s", Float, nullable=False),
    Column("report", JSON, nullable=False),  # whole, and last: its pages are not read for the columns before it
    UniqueConstraint("stage", "round", "participant", "run"),  # in the order in which rows are looked up
    ForeignKeyConstraint(["run", "participant"], ["devices.run", "devices.participant"]),
    ForeignKeyConstraint(["run", "stage", "round"], ["rounds.run", "rounds.stage", "rounds.round"]),
)

evaluations = Table(
    "evaluations",
    metadata,
    _run(),
    Column("stage", Integer, primary_key=True, autoincrement=False),
    Column("name", String, primary_key=True),  # random | raw_pixels | trained
    Column("knn", Float, nullable=False),
    Column("probe", Float),
    Column("metrics", JSON, nullable=False),
)

judgements = Table(
    "judgements",  # of the features of trained stages
    metadata,
    _run(),
    Column("stage", Integer, primary_key=True, autoincrement=False),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("collapsed", Boolean, nullable=False),
    Column("spread", Float, nullable=False),
    Column("rank", Float, nullable=False),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _run(),
    Column("stage", Integer, primary_key=True, autoincrement=False),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("parts", JSON, nullable=False),  # part -> blob
)
