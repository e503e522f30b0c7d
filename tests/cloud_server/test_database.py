"""The store in a database that others use too and that goes away."""

import os
import signal
import threading

import psycopg
import pytest
from sqlalchemy import event

from lwfed import disk
from lwfed.cloud_server.rounds import State
from lwfed.cloud_server.store import FILE_NAME, Contribution, schema
from lwfed.cloud_server.store import database as database_module
from lwfed.cloud_server.store import store as store_module
from lwfed.cloud_server.store.database import open_sqlite
from lwfed.config import load_config
from lwfed.errors import DatabaseUnreachable, StateError
from lwfed.signals import on_signals
from lwfed.transport.memory import MemoryBroker
from lwfed.wire.report import Traffic

from .conftest import TINY
from .fleets import HELLO, of, undisturbed
from .world import World


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
    assert second.begin(tiny()).resumed
    ending.join()


def test_a_server_that_was_replaced_while_it_was_cut_off_writes_nothing_more(opened, postgres, address, tiny):
    first = opened(address)
    first.begin(tiny())
    postgres.cut()
    second = opened(address)
    second.begin(tiny())
    with pytest.raises(StateError, match="another cloud-server has taken over run 'demo'"):
        first.admit("a", HELLO)
    with pytest.raises(StateError, match="taken over"), first.step(State(stage=2)):
        pass
    second.close()
    with pytest.raises(StateError, match="taken over"):
        first.admit("a", HELLO)
    found = opened(address)
    assert (found.devices(), found.state) == ([], State())


# Connections that are lost


@pytest.fixture
def fleet(world, address):
    fleet = world()
    fleet.database = address
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name)
    return fleet


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What an undisturbed run ends with."""
    root = tmp_path_factory.mktemp("expected")
    (root / "server").mkdir()
    fleet = undisturbed(lambda: World(root, load_config("demo", TINY), MemoryBroker()))
    encoder = fleet.finish()
    fleet.course.store.close()
    return encoder


def first_update(fleet):
    while not fleet.course.store.contributions():
        fleet.step()


def test_a_database_that_is_restarted_loses_nothing_and_changes_nothing(fleet, expected, postgres, said):
    first_update(fleet)
    sent = []
    tell = fleet.course.store.database.tell
    fleet.course.store.database.tell = lambda reason: (sent.append(len(fleet.broker.log)), tell(reason))
    postgres.stop()
    starting = threading.Timer(0.2, postgres.start)
    starting.start()
    encoder = fleet.finish()
    starting.join()
    assert len(of(said, "warning")) == 1
    assert "does not answer" in of(said, "warning")[0]["text"]
    assert [one["text"].split(maxsplit=1)[1] for one in of(said, "doing") if "database" in one["text"]] == ["the database answers again"]
    assert sent[0] == sent[1]  # nothing is said to devices meanwhile
    assert encoder == expected
    assert len(fleet.course.store.contributions()) == 8


def test_connections_that_are_cut_change_nothing(fleet, expected, postgres):
    first_update(fleet)
    for steps in range(1, 12):
        for _ in range(steps):
            fleet.step()
        postgres.cut()
    assert fleet.finish() == expected
    assert len(fleet.course.store.contributions()) == 8


def test_no_deadline_passes_while_the_database_is_away(fleet, postgres):
    first_update(fleet)
    here, clock = fleet.course.state, fleet.server._clock()

    def tell(reason):
        fleet.server._on_database(reason)
        fleet.now += 0.0 if reason is None else 1000.0  # a round has 100 s

    fleet.course.store.database.tell = tell
    postgres.cut()
    fleet.course.store.devices()
    assert fleet.now >= 1000.0
    assert fleet.server._clock() == clock
    fleet.server.handle(None)
    assert (fleet.course.state.phase, fleet.course.state.round) == (here.phase, here.round)


def test_a_step_is_not_written_twice_when_the_answer_to_its_commit_is_lost(opened, address, tiny, make_report, monkeypatch):
    store = opened(address)
    store.begin(tiny())
    store.admit("a", HELLO)
    told, lost = [], []
    store.database.tell = told.append
    dialect = store.database._engine.dialect
    commit = dialect.do_commit

    def lose(connection):
        commit(connection)
        if not lost:
            lost.append(connection)
            connection.dbapi_connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    monkeypatch.setattr(dialect, "do_commit", lose)
    contribute(store, make_report)
    assert ["unexpectedly" in told[0], told[1:]] == [True, [None]]
    assert [one.id for one in store.contributions()] == ["c1"]
    contribute(store, make_report, "c2", stage=2)  # steps are counted on from there
    lost.clear()
    assert store.admit("b", HELLO)[0] == 1
    assert [device.id for device in store.devices()] == ["a", "b"]


def test_a_run_that_was_put_back_is_not_written_to(opened, address, tiny):
    store = opened(address)
    store.begin(tiny())
    with store.step(State(stage=2)):
        pass
    store.database.transact(lambda connection: connection.execute(schema.runs.update().values(steps=0)))
    with pytest.raises(StateError, match="put back to an earlier state"), store.step(State(stage=3)):
        pass


def test_a_server_that_waits_for_its_database_can_be_ended(fleet, expected, postgres):
    first_update(fleet)
    postgres.stop()
    ending = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    ending.start()
    with on_signals(fleet.server._on_signal), pytest.raises(SystemExit):
        fleet.finish()
    ending.join()
    postgres.start()
    fleet.kill()
    fleet.start()
    assert fleet.finish() == expected


@pytest.fixture
def standby(postgres):
    """Calls after which it is one, and is none any more: new connections may only read."""

    def promote():
        with postgres.connect() as connection:
            connection.execute("SET default_transaction_read_only = off")
            connection.execute("ALTER ROLE lwfed RESET default_transaction_read_only")

    def demote():
        with postgres.connect() as connection:
            connection.execute("ALTER ROLE lwfed SET default_transaction_read_only = on")
        postgres.cut()

    yield demote, promote
    promote()


def test_a_standby_that_a_failover_leads_to_is_waited_for(opened, address, standby, tiny, make_report, monkeypatch):
    store = opened(address)
    store.begin(tiny())
    store.admit("a", HELLO)
    demote, promote = standby
    told, pauses = [], []

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            promote()

    store.database.tell = told.append
    monkeypatch.setattr(database_module.time, "sleep", pause)
    demote()
    contribute(store, make_report)
    assert len(pauses) == 3
    assert told[1:] == [None]
    assert [one.id for one in store.contributions()] == ["c1"]


@pytest.mark.parametrize("limit", ["lock_timeout", "statement_timeout"])
def test_a_statement_that_somebody_keeps_from_its_end_is_tried_again(opened, address, postgres, tiny, make_report, limit):
    store = opened(address)
    store.begin(tiny())
    store.admit("a", HELLO)
    store.database.transact(lambda connection: connection.exec_driver_sql(f"SET {limit} = 500"))
    told = []
    with postgres.connect() as other:
        other.execute("BEGIN")
        other.execute(f"LOCK TABLE {address.rpartition('%3D')[2]}.runs")

        def tell(reason):
            told.append(reason)
            if len(told) == 1:
                other.execute("ROLLBACK")

        store.database.tell = tell
        contribute(store, make_report)
    assert "cannot be used now: canceling statement" in told[0]
    assert told[-1] is None
    assert [one.id for one in store.contributions()] == ["c1"]


@pytest.mark.parametrize("code", ["53100", "58030", "57014", "40P01"])
def test_what_passes_by_itself_is_waited_for_once_a_run_has_begun(opened, address, tiny, make_report, code):
    store = opened(address)

    def fail(times):
        def work(connection):
            if times:
                times.pop()
                connection.exec_driver_sql(f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{code}'; END $$")
            return "done"

        return store.database.transact(work)

    with pytest.raises(DatabaseUnreachable, match="cannot be used now: no; check what its log says"):
        fail([1])
    store.begin(tiny())
    assert fail([1, 1]) == "done"


def test_a_server_that_was_replaced_is_not_mistaken_for_another_when_the_look_at_that_fails(opened, address, tiny, monkeypatch):
    """The lock on the run counts only with the look at its epoch."""
    store = opened(address)
    store.begin(tiny())
    store.database.transact(lambda connection: connection.info.clear())  # as a new connection
    look, looks = store._check_epoch, []

    def check(connection):
        looks.append(connection)
        if len(looks) == 1:
            connection.exec_driver_sql("DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '57014'; END $$")
        look(connection)

    monkeypatch.setattr(store, "_check_epoch", check)
    store.devices()
    store.devices()
    assert len(looks) == 2


def test_who_has_not_begun_does_not_wait(opened, postgres, address):
    store = opened(address)
    postgres.cut()
    with pytest.raises(DatabaseUnreachable, match="does not answer"):
        store.devices()


# What is durable


def test_an_update_is_on_disk_and_recorded_before_it_is_acknowledged(world, database, monkeypatch):
    happened = []
    sync = disk.sync
    monkeypatch.setattr(disk, "sync", lambda path: (sync(path), happened.append(("sync", str(path)))))
    fleet = world()
    fleet.database, fleet.durable = database, True
    fleet.start()
    event.listen(fleet.course.store.database._engine, "commit", lambda connection: happened.append(("commit", "")))
    execute = fleet.server._transport.execute
    sent = lambda command: (happened.append(("send", command.topic)), execute(command))  # noqa: E731
    monkeypatch.setattr(fleet.server._transport, "execute", sent)
    for name in ("a", "b"):
        fleet.join(name)
    fleet.finish()
    spool = str(fleet.root / "server" / "updates")
    updates = {one.blob for one in fleet.course.store.contributions()}
    done = [at for at, (what, where) in enumerate(happened) if what == "send" and where.endswith("/dn/done")]
    assert len(done) == len(updates) == 8
    for at in done:
        before = happened[:at]
        recorded = len(before) - 1 - before[::-1].index(("commit", ""))
        folder = len(before) - 1 - before[::-1].index(("sync", spool))
        assert happened[folder - 1][1].startswith(f"{spool}/parts/")
        assert folder < recorded
        assert not any(what == "send" for what, _ in happened[folder:recorded])


def test_commits_are_durable_whatever_the_database_s_default_is(opened, address, tmp_path):
    store = opened(f"{address}%20-csynchronous_commit%3Doff")
    assert store.database.transact(lambda connection: connection.exec_driver_sql("SHOW synchronous_commit").scalar()) == "on"
    remote = opened(f"{address}%20-csynchronous_commit%3Dremote_apply")
    assert remote.database.transact(lambda connection: connection.exec_driver_sql("SHOW synchronous_commit").scalar()) == "remote_apply"
    file = open_sqlite(tmp_path / FILE_NAME)
    assert file.transact(lambda connection: connection.exec_driver_sql("PRAGMA synchronous").scalar()) == 2  # FULL
    file.close()
