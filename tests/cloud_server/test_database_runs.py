"""A run in a database: the folder that belongs to it, and what commands say of it."""

import re
import sys

import pytest
from click.testing import CliRunner

from lwfed.cloud_server import orders
from lwfed.cloud_server.cli import main
from lwfed.cloud_server.course import Course
from lwfed.cloud_server.orders import Order
from lwfed.cloud_server.rounds import State
from lwfed.cloud_server.store import TIE_NAME, open_store
from lwfed.errors import StateError
from lwfed.tools.cli import main as lwfed


@pytest.fixture
def begun(tmp_path, address, tiny):
    """A run of the database that has weights, in folder `state`."""
    (tmp_path / "state").mkdir()
    course = Course(tiny("run.name=mine"), tmp_path / "state", durable=False, database=address)
    with course.store.step(State(phase="training", parts={"stem": course.blobs.put(b"weights").id})):
        pass
    course.store.close()
    return tmp_path / "state"


@pytest.fixture
def course(tmp_path, tiny):
    def course(folder, address, name="mine"):
        (tmp_path / folder).mkdir(exist_ok=True)
        made = Course(tiny(f"run.name={name}"), tmp_path / folder, durable=False, database=address)
        made.store.close()
        return made.state

    return course


def test_a_run_goes_on_in_its_own_folder_only(begun, course, address, postgres):
    course("state", address)
    refusals = {
        "is kept in database postgres at .*: give its --database": ("state", None),
        "does not hold it: give the --database that does": ("state", postgres.address()),
        "whose model is in another folder": ("other", address),
        "run.name: mine before, yours now": ("state", address, "yours"),
    }
    for text, arguments in refusals.items():
        with pytest.raises(StateError, match=text):
            course(*arguments)
    assert len(list((begun / "model").iterdir())) == 3  # weights, configuration, parts of what arrives
    course("other", None)
    with pytest.raises(StateError, match=r"kept in run.sqlite there: leave out --database"):
        course("other", address)


def test_a_run_may_be_moved_together_with_its_folder(begun, course, address):
    begun.rename(begun.with_name("moved"))
    state = course("moved", address)
    assert (state.phase, list(state.parts)) == ("training", ["stem"])


def test_a_note_in_the_folder_that_cannot_be_read_is_explained(begun, course, address):
    (begun / TIE_NAME).write_text("{")
    with pytest.raises(StateError, match="cannot be read"):
        course("state", address)


def run(*arguments, **environ):
    return CliRunner().invoke(main, [str(one) for one in arguments], env=environ)


def test_a_paused_run_says_how_it_goes_on(world, address, monkeypatch):
    fleet = world()
    fleet.database = address
    fleet.start()
    fleet.quiet()
    folder = fleet.root / fleet.state
    orders.give(folder, Order(do="pause"))
    fleet.server.take_orders()
    monkeypatch.undo()
    for words in (["--database", address], ["--state", folder, "--database", address]):
        (hint,) = re.findall(r"no round begins until (cloud-server resume .*)", run("status", *words).output)
        command = hint.replace("FOLDER", str(folder)).replace("URL", address).split()
        assert run(*command[1:]).exit_code == 0
    fleet.server.take_orders()
    assert not fleet.course.state.paused


def test_status_and_export_of_runs_in_a_database(world, address, tmp_path, monkeypatch):
    fleet = world("run.name=small")
    fleet.database = address
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name)
    encoder = fleet.finish()
    fleet.server.end()
    folder, out = fleet.root / "server", tmp_path / "encoder.safetensors"
    other = open_store(tmp_path, "other", address)
    other.begin(fleet.config.model_copy(update={"run": fleet.config.run.model_copy(update={"name": "other"})}))
    monkeypatch.undo()
    (tmp_path / "cloud-server").mkdir()
    everything = run("status", "--database", address).output
    assert "small (layer_wise), in database postgres at " in everything
    assert "other (layer_wise)" in everything
    assert "no server" not in everything
    fleet.course.store.close()
    one = run("status", "--state", folder, LWFED_DATABASE=address).output
    assert f"small (layer_wise), in {folder}" in one
    assert "finished" in one
    assert "no server is running" in one
    assert "other" not in one
    assert run("export", "--state", folder, "--out", out, "--database", address).exit_code == 0
    assert out.read_bytes() == encoder
    asked = ["evaluate", str(folder), "--data", "digits", "--protocol", "knn", "--limit", "50", "--database", address]
    evaluated = CliRunner().invoke(lwfed, asked)
    assert "run small, layer_wise, stage 2, on digits" in evaluated.output
    without = run("export", "--state", folder, "--out", out)
    assert without.exit_code == 73
    assert "run 'small' in" in without.output
    folder.rename(tmp_path / "cloud-server" / "small")
    hint = run("status", XDG_STATE_HOME=str(tmp_path))
    assert hint.exit_code == 0
    assert "small, of " in hint.output
    assert "add its --database" in hint.output
    other.close()


@pytest.mark.parametrize(
    ("given", "code", "says"),
    [
        ("nonsense-geheim", 78, "write postgresql://USER@HOST/DATABASE"),
        ("postgresql://lwfed:geheim@host:port/runs", 78, "write postgresql://"),
        ("postgresql://lwfed:geheim@host", 78, "write postgresql://"),
        ("postgresql://lwfed:geheim@host/runs?port=geheim", 78, "an option that cannot be"),
        ("sqlite:////tmp/geheim", 78, "SQLite is what there is without it"),
        ("postgresql://lwfed:geheim@127.0.0.1:1/runs", 69, "database runs at 127.0.0.1:1 does not answer: "),
        ("postgresql://lwfed:geheim@127.0.0.1/runs?gssencmode=geheim", 69, "***"),
    ],
)
def test_addresses_that_lead_nowhere_are_explained_without_their_passwords(given, code, says, tmp_path):
    for arguments in (("status",), ("serve", "--config", "demo", "--state", tmp_path / "state")):
        result = run(*arguments, "--database", given)
        assert result.exit_code == code, result.output
        assert says in result.output
        assert "geheim" not in result.output


def test_without_psycopg_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    result = run("status", "--database", "postgresql://host/runs")
    assert result.exit_code == 72
    assert "pip install 'lwfed[postgres]'" in result.output
