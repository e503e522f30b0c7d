"""Stores of older and newer programs, and how they are brought up to date."""

import json
import sqlite3
import threading
from pathlib import Path

import pytest
from alembic import command, op
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from lwfed.cloud_server.store import FILE_NAME, Judgement, Scores, exclusion, open_store, schema, stored_runs
from lwfed.cloud_server.store.database import open_postgresql, open_sqlite
from lwfed.cloud_server.store.versions import prepare
from lwfed.config import load_config
from lwfed.errors import ConfigError, StateError
from lwfed.wire.report import Traffic

from .fleets import HELLO, start

OLD = "run-6.sql"  # written by a server that had no migrations yet


@pytest.fixture
def old(tmp_path):
    """The folder of a run as it was before there were migrations."""
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.executescript((Path(__file__).parent / OLD).read_text())
    connection.close()
    return tmp_path


def asked(path, question):
    with sqlite3.connect(path) as connection:
        found = connection.execute(question).fetchall()
    connection.close()
    return found


def test_a_store_of_before_migrations_is_taken_over_whole(old):
    ((stored,),) = asked(old / FILE_NAME, "SELECT config FROM runs")
    store = open_store(old, "demo", clock=lambda: 2000.0)
    config = store.config.model_dump(mode="json")
    assert [name for name, section in json.loads(stored).items() if not section.items() <= config[name].items()] == []
    assert store.scores() == {(0, "random"): Scores(0.25, None)}
    assert store.judgements() == {(1, 1): Judgement(False, 0.9, 40.0)}
    assert store.checkpoints() == {(1, 1): {"stem": "ssss"}}
    greeting = HELLO.model_copy(update={"start": start(1, process=0)})
    assert [(device.participant, device.id, device.hello) for device in store.devices()] == [(0, "a", greeting), (1, "b", greeting)]
    assert [(one.id, one.participant, one.traffic) for one in store.contributions()] == [("c1", 0, Traffic(down=5_000_000_000, up=3))]
    begun = store.begin(load_config("demo"))
    assert (begun.id, begun.epoch, begun.resumed) == ("demo", 2000, True)  # its devices know it by its name
    assert (begun.state.phase, begun.state.chosen) == ("training", (0, 1))
    with store.step(begun.state) as step:
        step.close_round(1, 1)
    assert [(row.closed_s, row.left_out) for row in store.rounds()] == [(2000.0, [])]
    store.close()


def test_keys_that_a_stored_configuration_did_not_have_are_as_in_base_yaml(opened, database, tiny):
    store, config, base = opened(database), tiny("rounds.deadline_s=7", "rounds.quorum=0.9"), load_config("base")
    data = config.model_dump(mode="json")
    del data["rounds"]["quorum"], data["alignment"]
    store.begin(config)
    keep(store, data)
    found = store.config
    assert (found.rounds.quorum, found.alignment, found.rounds.deadline_s) == (base.rounds.quorum, base.alignment, 7)
    keep(store, {**data, "forgotten": {}})
    with pytest.raises(ConfigError, match="does not know forgotten, so it is older"):
        store.config  # noqa: B018


def keep(store, data):
    """As a server of another version has stored its configuration."""
    store.database.transact(lambda connection: connection.execute(schema.runs.update().values(config=json.dumps(data).encode())))


def test_a_copy_of_the_file_is_kept_before_it_is_migrated(old):
    before = asked(old / FILE_NAME, "SELECT * FROM runs")
    open_store(old, "demo").close()
    assert asked(old / "run-6.sqlite", "SELECT * FROM runs") == before
    assert asked(old / "run-6.sqlite", "PRAGMA user_version") == [(6,)]
    assert asked(old / FILE_NAME, "PRAGMA user_version") == [(int(schema.HEAD),)]  # an old program refuses it
    assert {path.name for path in old.iterdir()} == {FILE_NAME, "run-6.sqlite"}
    open_store(old, "demo").close()


def test_a_migration_that_fails_changes_nothing(old, monkeypatch):
    def fail(*arguments):
        op.execute("CREATE TABLE half (done INTEGER)")
        raise RuntimeError("the power went")

    monkeypatch.setattr(op, "add_column", fail)
    with pytest.raises(RuntimeError, match="the power went"):
        open_store(old, "demo")
    monkeypatch.undo()
    tables = {name for (name,) in asked(old / FILE_NAME, "SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert tables == set(schema.metadata.tables)
    store = open_store(old, "demo")
    assert store.has_contribution("c1")
    store.close()


def test_who_only_looks_does_not_migrate(old):
    with pytest.raises(StateError, match="of version 6, older than 10: `cloud-server serve` migrates it"), stored_runs(old, None):
        pass
    assert [path.name for path in old.iterdir()] == [FILE_NAME]


def test_a_store_that_is_too_old_is_refused(old):
    with sqlite3.connect(old / FILE_NAME) as connection:
        connection.execute("PRAGMA user_version = 5")
    connection.close()
    with pytest.raises(StateError, match="of version 5; this cloud-server takes over 6 and later"):
        open_store(old, "demo")


def test_a_store_of_a_newer_program_is_refused(opened, database, tmp_path):
    store = opened(database)
    store.database.transact(lambda connection: connection.execute(schema.version.update().values(version_num="99")))
    store.close()
    with pytest.raises(StateError, match="of version 99, newer than this cloud-server's 10: install"):
        opened(database)
    with pytest.raises(StateError, match="newer"), stored_runs(tmp_path / "state", database):
        pass


def connected(database, tmp_path):
    return open_postgresql(database) if database else open_sqlite(tmp_path / FILE_NAME)


def configured(connection):
    config = Config()
    config.set_main_option("script_location", "lwfed.cloud_server.store:migrations")
    config.attributes["connection"] = connection
    return config


def differences(connection):
    context = MigrationContext.configure(connection, opts={"version_table": schema.version.name})
    return compare_metadata(context, schema.metadata)


def test_migrations_lead_to_the_tables_that_new_stores_get(database, postgres, tmp_path):
    migrated = connected(database, tmp_path)
    migrated.transact(lambda connection: command.upgrade(configured(connection), "head"))
    assert migrated.transact(differences) == []
    migrated.close()
    (tmp_path / "made").mkdir()
    made = connected(database and postgres.address(), tmp_path / "made")
    prepare(made)
    assert made.transact(differences) == []
    made.transact(lambda connection: connection.exec_driver_sql("ALTER TABLE runs ADD COLUMN more INTEGER"))
    assert len(made.transact(differences)) == 1
    made.close()


def test_the_versions_that_are_named_are_those_of_the_migrations():
    script = ScriptDirectory.from_config(configured(None))
    assert (script.get_heads(), script.get_bases()) == ([schema.HEAD], [schema.FIRST])


def test_a_database_is_not_migrated_under_a_server_that_is_at_work(opened, address, postgres):
    older = open_postgresql(address)
    older.transact(lambda connection: command.upgrade(configured(connection), "6"))
    row = {"name": "demo", "config": b"{}", "started_s": 0.0, "epoch": 1, "state": "{}"}
    older.transact(lambda connection: connection.execute(schema.runs.insert().values(row)))
    assert older.transact(lambda connection: exclusion.hold(connection, "demo"))
    with pytest.raises(StateError, match="older cloud-servers serve demo in it"):
        opened(address, "another")
    older.close()
    postgres.cut()
    opened(address, "another")


def test_tables_of_another_program_are_left_alone(opened, address):
    other = open_postgresql(address)
    other.transact(lambda connection: connection.exec_driver_sql("CREATE TABLE runs (id INTEGER)"))
    with pytest.raises(StateError, match=r"tables of another program \(runs\): give lwfed a database, or a schema, of its own"):
        opened(address)
    other.close()


def test_servers_that_begin_at_once_in_an_empty_database_both_do(opened, address, tiny):
    threads = [threading.Thread(target=opened, args=(address, name, name)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [opened(address, name, name).begin(tiny(f"run.name={name}")).resumed for name in ("first", "second")] == [False, False]
