"""A kill that would not hit fails instead."""

import sqlite3
import subprocess
import sys
from itertools import count
from types import SimpleNamespace

import pytest

from lwfed.cloud_server.rounds import State

from . import moments
from .moments import Moment, Watch

AIM = Moment("server", "calibrating", (1, 2), look=3)
MERGING = Moment("server's worker", "aggregating", (1, 2))
AIMS = pytest.mark.parametrize("aim", [AIM, MERGING], ids=lambda aim: aim.party)
WITH_WORKER = (
    "import shutil, subprocess; subprocess.Popen(['lwfed.cloud_server.worker'], executable=shutil.which('cat')); print(flush=True); input()"
)


@pytest.fixture
def watch(tmp_path):
    """Of a server that does nothing, with a store and a worker that does nothing either."""
    (tmp_path / "server" / "updates").mkdir(parents=True)
    with sqlite3.connect(tmp_path / "server" / "run.sqlite") as database:
        database.execute("CREATE TABLE runs (state TEXT)")
        database.execute("CREATE TABLE contributions (stage, round, participant, blob)")
        database.execute("INSERT INTO contributions VALUES (1, 2, 0, 'update')")
    (tmp_path / "server" / "updates" / "update").touch()
    with subprocess.Popen([sys.executable, "-c", WITH_WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield Watch(tmp_path, SimpleNamespace(process=process, transcript=lambda: ""))
        process.kill()


def store(tmp_path, state):
    with sqlite3.connect(tmp_path / "server" / "run.sqlite") as database:
        database.execute("DELETE FROM runs")
        database.execute("INSERT INTO runs VALUES (?)", [state.to_json()])


def test_a_server_in_the_phase_is_killed(watch, tmp_path):
    store(tmp_path, State(phase="calibrating", round=2))
    watch.strike(AIM)
    assert watch.server.process.wait() == -9


@AIMS
@pytest.mark.parametrize(
    "state", [State(phase="evaluating", round=2, trained=True), State(phase="preparing", stage=2), State(phase="finished", round=2)]
)
def test_a_phase_that_has_passed_is_a_failure(watch, tmp_path, aim, state):
    store(tmp_path, state)
    with pytest.raises(pytest.fail.Exception, match="has passed unseen"):
        watch.strike(aim)
    assert watch.server.process.poll() is None


@AIMS
def test_a_server_that_ends_before_is_a_failure(watch, tmp_path, aim):
    store(tmp_path, State(phase="aggregating", round=2))
    watch.server.process.communicate(b"\n")
    with pytest.raises(pytest.fail.Exception, match="ended before"):
        watch.strike(aim)


@AIMS
@pytest.mark.parametrize("phase", ["waiting", "training"])
def test_a_round_that_never_closes_is_a_failure(watch, tmp_path, monkeypatch, aim, phase):
    monkeypatch.setattr(moments, "LOOKS", 20)
    store(tmp_path, State(phase=phase, round=2))
    with pytest.raises(pytest.fail.Exception, match=f"not come after 20 looks: the run is at 1, 2, {phase}"):
        watch.strike(aim)
    assert watch.server.process.poll() is None


def test_a_worker_that_never_unpacks_the_updates_is_a_failure(watch, tmp_path, monkeypatch):
    begun = count()

    def work_begun():
        store(tmp_path, State(phase="aggregating", round=2))
        return next(begun)

    monkeypatch.setattr(moments, "LOOKS", 2 * moments.STEPS)
    monkeypatch.setattr(watch, "_work_begun", work_begun)
    store(tmp_path, State(phase="training", round=2))
    with pytest.raises(pytest.fail.Exception, match="not come after 100 looks: the run is at 1, 2, aggregating"):
        watch.strike(MERGING)
    assert [path.name for path in (tmp_path / "server" / "updates").iterdir()] == ["update"]
    assert watch.server.process.poll() is None
