"""What tests of the server are given: configurations, databases, fleets in virtual time."""

import itertools
import json

import click
import numpy as np
import pytest

from lwfed.cloud_server.store import open_store
from lwfed.config import load_config
from lwfed.transport.memory import MemoryBroker
from lwfed.wire import tensors
from lwfed.wire.sizes import stated_shapes

from .devices import report
from .merging import merge_parts, settings_of
from .postgres import Postgres, find
from .world import World

TINY = [
    "model.image_size=8", "model.width=8", "model.depth=2", "model.heads=2", "ssl.hidden_dim=8", "ssl.output_dim=4",
    "stages.rounds_per_stage=2", "rounds.min_devices=2", "rounds.deadline_s=100", "transfer.chunk_bytes=1024",
    "calibration.every=round", "evaluation.data=digits",
]  # fmt: skip


@pytest.fixture
def tiny():
    return lambda *settings: load_config("demo", [*TINY, *settings])


@pytest.fixture(scope="session")
def postgres():
    if find("postgres") is None:
        pytest.skip("PostgreSQL is not installed")
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request):
    """The address of an empty one, as `--database` takes it."""
    return None if request.param == "sqlite" else request.getfixturevalue("postgres").address()


@pytest.fixture
def opened(tmp_path):
    """Opens a store of a folder of its own."""
    stores = []

    def opened(address, run="demo", folder="state"):
        (tmp_path / folder).mkdir(exist_ok=True)
        stores.append(open_store(tmp_path / folder, run, address, lambda: 1000.0, durable=False))
        return stores[-1]

    yield opened
    for one in stores:
        one.close()


@pytest.fixture
def address(postgres):
    return postgres.address()


@pytest.fixture
def make_report():
    return report


@pytest.fixture
def said(monkeypatch):
    """What the server says, as events."""
    events = []
    monkeypatch.setattr(click, "echo", lambda line: events.append(json.loads(line)))
    return events


@pytest.fixture
def world(tmp_path, tiny, said):
    worlds = []
    numbers = itertools.count()

    def world(*settings, faults=None):
        root = tmp_path / f"world-{next(numbers)}"
        (root / "server").mkdir(parents=True)
        worlds.append(World(root, tiny(*settings), MemoryBroker(faults)))
        return worlds[-1]

    yield world
    for one in worlds:
        if one.course:
            one.course.store.close()


@pytest.fixture
def write(tmp_path):
    """A file of tensors, as a device's update is one."""

    def write(name, **values):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(tensors.encode({name: np.asarray(value, np.float32) for name, value in values.items()}))
        return path

    return write


@pytest.fixture
def merge(write):
    """The tensor w of some shares, where devices had received `before`, ones where it is not stated."""

    def merge(rule, shares, before=None, **settings):
        shape = stated_shapes(shares[0].path)["w"] if shares else ()
        received = {"stem": write("before", w=np.ones(shape) if before is None else before)}
        return merge_parts(settings_of(rule, **settings), received, shares)["stem"]["w"]

    return merge
