"""The store in a database that others use too, that goes away, or that is of another version."""

import signal
import sqlite3
import threading

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from click.testing import CliRunner

from lwfed.cloud_server.cli import main
from lwfed.cloud_server.course import Course
from lwfed.cloud_server.rounds import State
from lwfed.cloud_server.store import FILE_NAME, TIE_NAME, Contribution, bind_folder, open_store, schema, stored_runs
from lwfed.cloud_server.store import store as store_module
from lwfed.cloud_server.store.database import open_postgresql, open_sqlite
from lwfed.cloud_server.store.versions import prepare
from lwfed.errors import ConfigError, DatabaseUnreachable, MissingDependency, StateError
from lwfed.wire.messages import Hello, Traffic

from .fleets import of, undisturbed

HELLO = Hello(boot=1, lwfed="0", python="3", torch=None, machine="aarch64", cores=4, memory_mb=900, images=100, source="folder")
OLD = "run-6.sql"  # written by a server that had no migrations yet


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
def impatient(monkeypatch):
    monkeypatch.setattr(store_module, "HANDOVER_S", 0.0)


def contribute(store, make_report, id="c1", stage=1):
    with store.step(State(stage=stage, parts={"stem": "blob"})) as step:
        step.begin_round(stage, 1, (0,))
        step.contribute(Contribution(id, stage, 1, 0, "b" * 64, 9, make_report(), Traffic(down=3, up=2)))
        step.checkpoint(stage, 1, {"stem": f"of {id}"})


# Several runs


def test_runs_of_one_database_see_nothing_of_each_other(opened, address, tiny, make_report):
    first, second = opened(address, "first", "1"), opened(address, "second", "2")
    for store in (first, second):
        store.begin(tiny(f"run.name={store.run}"))
    first.admit("a", HELLO)
    first.admit("b", HELLO)
    contribute(first, make_report)
    assert second.config == tiny("run.name=second")
    assert second.state == State()
    assert (second.devices(), second.contributions(), second.rounds(), second.checkpoints()) == ([], [], [], {})
    assert (second.contributed(), second.figures(1), second.loss(1, 1), second.stage_began_s(1)) == ({}, None, None, None)
    assert not second.has_contribution("c1")
    assert second.admit("b", HELLO) == (0, True)
    second.note_double(0)
    contribute(second, make_report, "c2")
    with second.step(State(phase="finished")) as step:
        step.close_round(1, 1)
        step.forget_checkpoint(1)
    assert [device.doubled_s for device in first.devices()] == [None, None]
    assert [row.closed_s for row in first.rounds()] == [None]
    assert first.checkpoints() == {(1, 1): {"stem": "of c1"}}
    assert first.state == State(parts={"stem": "blob"})
    assert first.times == (1000.0, None)


def test_two_servers_of_one_run_exclude_one_another(opened, address, tiny, impatient):
    first = opened(address)
    first.begin(tiny("run.name=demo"))
    second = opened(address, folder="elsewhere")
    with pytest.raises(StateError, match="another cloud-server serves run 'demo'"):
        second.begin(tiny("run.name=demo"))
    assert second.served
    opened(address, "another").begin(tiny("run.name=another"))
    first.close()
    second.begin(tiny("run.name=demo"))
    assert second.served is False  # by anybody but itself


def test_a_server_that_ends_hands_its_run_over(opened, address, tiny):
    first, second = opened(address), opened(address)
    first.begin(tiny())
    ending = threading.Timer(0.2, first.close)
    ending.start()
    assert second.begin(tiny())[2]
    ending.join()


def test_a_server_that_was_replaced_while_it_was_cut_off_writes_nothing_more(opened, postgres, address, tiny):
    first, second = opened(address), opened(address)
    first.begin(tiny())
    postgres.cut()
    second.begin(tiny())
    for write in (lambda: first.admit("a", HELLO), lambda: first.has_contribution("c1"), lambda: first.step(State()).__enter__):
        second.state  # noqa: B018 - asked for in between, so that its own connection is there
    with pytest.raises(StateError, match="another cloud-server has taken over run 'demo'"):
        first.admit("a", HELLO)
    with pytest.raises(StateError, match="taken over"), first.step(State(stage=2)):
        pass
    second.close()
    with pytest.raises(StateError, match="taken over"):
        first.admit("a", HELLO)
    assert opened(address).devices() == []
