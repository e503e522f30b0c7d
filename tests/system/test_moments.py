"""A kill that would not hit fails instead."""

import sqlite3
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lwfed.cloud_server.rounds import State

from .moments import Moment, Watch

AIM = Moment("server", "calibrating", (1, 2), look=3)
AIMS = pytest.mark.parametrize("aim", [AIM, Moment("server's worker", "aggregating", (1, 2))], ids=lambda aim: aim.party)


@pytest.fixture
def watch(tmp_path):
    """Of a server that does nothing, with a store."""
    (tmp_path / "server").mkdir()
    with sqlite3.connect(tmp_path / "server" / "run.sqlite") as database:
        database.execute("CREATE TABLE runs (state TEXT)")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield Watch(tmp_path, SimpleNamespace(process=process, transcript=lambda: ""))
        process.kill()


def store(tmp_path, state):
    with sqlite3.connect(tmp_path / "server" / "run.sqlite") as database:
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
