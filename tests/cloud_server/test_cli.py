"""The program's commands on the folder of a run, in this process."""

import json
import os
import shutil
import signal
import socket
import stat
from contextlib import closing

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.numpy import load
from safetensors.torch import load_file

from lwfed.cloud_server import broker, orders, serve
from lwfed.cloud_server.authority import Authority
from lwfed.cloud_server.checkpoint import choose
from lwfed.cloud_server.cli import main
from lwfed.cloud_server.registry import Contact, Registry
from lwfed.data.torchvision_sets import import_torchvision
from lwfed.errors import ConfigError, MissingDependency, PortInUse, StateError
from lwfed.locks import locked_state
from lwfed.models.backbones import load_encoder


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(main, [str(one) for one in arguments])


@pytest.fixture
def finished(world):
    fleet = world("run.name=small")
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name)
    fleet.finish()
    fleet.server.end()
    return fleet


def test_status_of_a_finished_run(finished, run, monkeypatch):
    monkeypatch.undo()  # the console is the program's own again
    result = run("status", "--state", finished.root / "server")
    assert result.exit_code == 0
    assert "small (layer_wise)" in result.output
    assert "stage 2 of 2, round 2 of 2, finished" in result.output
    assert "device 1" in result.output
    assert "kNN 50.0%, linear probe 25.0%" in result.output


def test_status_for_other_programs(finished, run, monkeypatch):
    monkeypatch.undo()
    (line,) = run("status", "--json", "--state", finished.root / "server").output.splitlines()
    told = json.loads(line)
    assert (told["run"], told["phase"], told["stage"], told["round"], told["served"]) == ("small", "finished", 2, 2, False)
    assert [(one["device"], one["presence"], one["left_out"]) for one in told["devices"]] == [("a", "here", 0), ("b", "here", 0)]
    places = [(one["stage"], one["round"], one["updates"], one["left_out"]) for one in told["rounds"]]
    assert places == [(stage, round, 2, []) for stage in (1, 2) for round in (1, 2)]
    assert {(one["stage"], one["name"], one["knn"], one["probe"]) for one in told["scores"]} >= {(2, "trained", 0.5, 0.25)}
    assert told["loss"] == finished.course.store.loss(2, 2)


def test_status_says_whether_a_server_is_at_work(finished, run, monkeypatch):
    monkeypatch.undo()
    root = finished.root / "server"
    without = run("status", "--state", root).output
    assert "no server is running" in without
    assert "device 1    was here; b," in without
    with locked_state(root, "use another"):
        while_served = run("status", "--state", root).output
    assert "no server" not in while_served
    assert "device 1    here; b," in while_served


def test_asking_for_the_status_keeps_no_server_out(finished, run, monkeypatch):
    monkeypatch.undo()
    root = finished.root / "server"
    run("status", "--state", root)
    with locked_state(root, "use another"):
        pass


def test_a_run_is_paused_and_resumed_while_its_server_runs_or_is_down(world, run, monkeypatch):
    fleet = world()
    fleet.start()
    fleet.join("a")
    root = fleet.root / "server"
    monkeypatch.undo()
    assert "it is done when `cloud-server serve` is started" in run("pause", "--state", root).output
    assert "1 order waits" in run("status", "--state", root).output
    fleet.server.take_orders()
    assert f"no round begins until cloud-server resume --state {root}" in run("status", "--state", root).output
    with locked_state(root, "use another"):
        assert "the server goes on with the run" in run("resume", "--state", root).output
    fleet.server.take_orders()
    assert "no round begins" not in run("status", "--state", root).output
    run("pause", "--now", "--state", root)
    assert [orders.read(path) for path in orders.waiting(root)] == [orders.Order(do="pause", now=True)]


@pytest.mark.parametrize("command", ["pause", "resume"])
def test_there_is_nothing_to_pause_in_a_run_that_is_over_nor_where_there_is_none(finished, run, command, tmp_path, monkeypatch):
    monkeypatch.undo()
    over = run(command, "--state", finished.root / "server")
    assert (over.exit_code, over.output) == (73, f"error: run small is finished: there is nothing to {command}\n")
    none = run(command, "--state", tmp_path / "nowhere")
    assert none.exit_code == 73
    assert "there is no run" in none.output
    assert not (tmp_path / "nowhere").exists()


def test_status_finds_the_runs_of_this_user(run, tmp_path, monkeypatch, finished):
    monkeypatch.undo()
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    nothing = CliRunner().invoke(main, ["status"], env=environ)
    assert nothing.exit_code == 73
    assert "cloud-server serve" in nothing.output
    (tmp_path / "cloud-server").mkdir()
    os.rename(finished.root / "server", tmp_path / "cloud-server" / "small")
    assert "small" in CliRunner().invoke(main, ["status"], env=environ).output
    os.rename(tmp_path / "cloud-server" / "small", finished.root / "server")


def test_the_one_run_of_this_user_needs_no_state_and_of_two_one_is_named(finished, tmp_path, monkeypatch):
    monkeypatch.undo()
    folder, out = tmp_path / "cloud-server", tmp_path / "encoder.safetensors"
    shutil.copytree(finished.root / "server", folder / "small")

    def said(*words):
        return CliRunner().invoke(main, [str(word) for word in words], env={"XDG_STATE_HOME": str(tmp_path)})

    assert said("export", "--out", out).exit_code == 0
    assert out.read_bytes() == finished.course.encoder_path.read_bytes()
    assert "run small is finished: there is nothing to pause" in said("pause").output
    shutil.copytree(folder / "small", folder / "other")
    for words in (["pause"], ["resume"], ["export", "--out", out]):
        refused = said(*words)
        assert refused.exit_code == 73
        assert refused.output == f"error: {folder} has several runs (other, small): say with --state which one\n"


def test_export_of_the_newest_model_and_of_a_stage(finished, run, tmp_path, monkeypatch):
    monkeypatch.undo()
    newest, early = tmp_path / "newest.safetensors", tmp_path / "sub" / "early.safetensors"
    assert "stage 2" in run("export", "--state", finished.root / "server", "--out", newest).output
    assert newest.read_bytes() == finished.course.encoder_path.read_bytes()
    assert stat.S_IMODE(newest.stat().st_mode) == 0o666 & ~umask()
    assert "stage 1" in run("export", "--state", finished.root / "server", "--stage", 1, "--out", early).output
    assert not any(name.startswith("blocks.1.") for name in load(early.read_bytes()))
    result = run("export", "--state", finished.root / "server", "--stage", 9, "--out", early)
    assert result.exit_code == 73
    assert "stages with one: 1, 2" in result.output


@pytest.mark.parametrize(
    "options",
    [
        ["--listen", "porch.local", "--port", 1884],
        ["--listen", "porch.local", "--broker", "embedded"],
        ["--listen", "porch.local:65535"],
        ["--broker", "nonsense"],
        ["--broker", "mqtt://127.0.0.1", "--port", 1884],
        ["--broker", "mqtt://porch.local"],
        ["--broker", "mqtts://porch.local", "--key", "key.pem"],
        ["--username", "me"],
    ],
)
def test_a_run_is_not_begun_with_options_that_are_refused(run, tmp_path, monkeypatch, options):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    state = tmp_path / "cloud-server" / "demo"
    settings = ["calibration.every=never", "evaluation.data=null"]
    result = run("serve", "--config", "demo", *(f"--set={one}" for one in settings), *options)
    assert (result.exit_code, result.output.count("error: ")) == (ConfigError.exit_code, 1)
    assert state.is_dir()
    assert "there is no run" in run("status", "--state", state).output


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_timm_loads_an_export_and_computes_the_same(finished):
    import_torchvision()  # which timm needs, in whatever condition
    import timm

    path = finished.course.encoder_path
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["lwfed"])
    model = timm.create_model(**about["timm"]).eval()
    tensors = load_file(path)
    model.load_state_dict(tensors, strict=True)
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        ours = load_encoder(finished.config.model, tensors).features(images)
        theirs = model((images - about["input"]["mean"]) / about["input"]["std"])
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert about["config_sha256"] == finished.config.digest


def test_a_finished_run_is_said_to_be_finished_and_ends_at_once(finished, run, monkeypatch, tmp_path):
    monkeypatch.undo()
    finished.course.store.close()
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(finished.config.model_dump(mode="json")))
    options = ("serve", "--config", path, "--state", finished.root / "server", "--until-done", "--json")
    result = run(*options)
    assert result.exit_code == 0
    assert [json.loads(line)["event"] for line in result.output.splitlines()] == ["run", "finished"]
    other = run(*options, "--set", "train.lr=0.5")
    assert other.exit_code == 73
    assert "train.lr: 0.01 before, 0.5 now" in other.output


@pytest.fixture
def served(finished, run, monkeypatch, tmp_path):
    """Serve the finished run again with such options, of a user whose state is below `tmp_path`."""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    finished.course.store.close()
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(finished.config.model_dump(mode="json")))
    return lambda *options: run("serve", "--config", path, "--state", finished.root / "server", "--json", *options)


def test_a_finished_run_needs_neither_the_authority_nor_a_broker_to_be_said_to_be_finished(served, tmp_path, monkeypatch):
    monkeypatch.setattr(broker, "find_mosquitto", lambda: None)
    with locked_state(tmp_path / "cloud-server" / "_authority", "end it") as authority:
        result = served("--listen", "porch.local", "--until-done")
        assert [path.name for path in authority.iterdir()] == ["lock"]
    assert (result.exit_code, [json.loads(line)["event"] for line in result.output.splitlines()]) == (0, ["run", "finished"])


def test_enrol_founds_no_authority(run, tmp_path, monkeypatch):
    """A server that runs would have another one."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = tmp_path / "cloud-server" / "_authority"
    folder.mkdir(parents=True)
    with closing(Registry(folder)) as registry:
        registry.contact = Contact("garden.local", 8883, "default")
    result = run("enrol", "porch")
    assert (result.exit_code, "authority.pem is missing" in result.output) == (StateError.exit_code, True)
    Authority(folder)
    assert run("enrol", "porch").exit_code == 0
    refused = run("enrol", "--", "-porch")
    assert (refused.exit_code, "no - at the beginning" in refused.output) == (ConfigError.exit_code, True)


@pytest.mark.parametrize(
    ("options", "mosquitto", "code"),
    [
        (["--set", "train.lr=0.5"], "/bin/false", StateError.exit_code),
        ([], None, MissingDependency.exit_code),
        ([], "/bin/false", PortInUse.exit_code),
    ],
    ids=["another run", "no mosquitto", "a port in use"],
)
def test_tokens_do_not_lead_to_a_server_that_did_not_start(served, tmp_path, monkeypatch, options, mosquitto, code):
    monkeypatch.setattr(broker, "find_mosquitto", lambda: mosquitto)
    monkeypatch.setattr(broker, "RELEASE_S", 0.0)
    (tmp_path / "cloud-server" / "_authority").mkdir(parents=True)
    with closing(Registry(tmp_path / "cloud-server" / "_authority")) as registry, socket.create_server(("127.0.0.1", 0)) as other:
        registry.contact = known = Contact("garden.local", 8883, "default")
        result = served("--listen", f"localhost:{other.getsockname()[1]}", *options)
        assert (result.exit_code, registry.contact) == (code, known), result.output


def test_a_server_starts_later_than_one_whose_clock_was_ahead(served, tmp_path, monkeypatch):
    monkeypatch.setattr(broker, "find_mosquitto", lambda: "/bin/false")
    monkeypatch.setattr(broker, "RELEASE_S", 0.0)
    (tmp_path / "cloud-server" / "_authority").mkdir(parents=True)
    with closing(Registry(tmp_path / "cloud-server" / "_authority")) as registry, socket.create_server(("127.0.0.1", 0)) as other:
        registry.claim(4_000_000_000)  # of another run
        for _ in range(2):
            assert served("--listen", f"localhost:{other.getsockname()[1]}").exit_code == PortInUse.exit_code
        assert registry.epoch == 4_000_000_002


@pytest.fixture
def stopped(world):
    """With the stage that collapses."""

    def stopped(stage):
        fleet = world("stages.on_collapse=stop")
        fleet.collapses = {(stage, 1)}
        fleet.start()
        for name in ("a", "b"):
            fleet.join(name)
        fleet.settle(until=lambda: fleet.course.state.over)
        fleet.quiet()
        fleet.server.end()
        return fleet

    return stopped


def test_a_stopped_run_says_why_and_ends_with_a_code_of_its_own(stopped, run, monkeypatch, tmp_path):
    fleet = stopped(2)
    monkeypatch.undo()
    fleet.course.store.close()
    root, path = fleet.root / "server", tmp_path / "stopped.yaml"
    path.write_text(json.dumps(fleet.config.model_dump(mode="json")))
    result = run("serve", "--config", path, "--state", root, "--until-done")
    assert result.exit_code == 65
    assert "error: stage 2 collapsed: its features are all alike; a lower train.lr" in result.output
    assert "stopped     stage 2 collapsed" in run("status", "--state", root).output


def test_what_collapsed_is_exported_only_when_asked_for(stopped, run, monkeypatch, tmp_path):
    first, second = stopped(1), stopped(2)
    monkeypatch.undo()
    out = ("--out", tmp_path / "encoder.safetensors")
    assert "stage 1" in run("export", "--state", second.root / "server", *out).output
    assert "stage 2" in run("export", "--state", second.root / "server", "--stage", 2, *out).output
    refused = run("export", "--state", first.root / "server", *out)
    assert refused.exit_code == 73
    assert "stage 1 collapsed" in refused.output
    assert "--stage 1 writes it all the same" in refused.output
    assert run("export", "--state", first.root / "server", "--stage", 1, *out).exit_code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_server_listens_to_it_ends_it_cleanly(run, tmp_path, monkeypatch, number):
    def interrupted(config):
        os.kill(os.getpid(), number)
        raise AssertionError("went on")

    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(serve, "check_sources", interrupted)
    result = run("serve", "--config", "demo", "--state", tmp_path)
    assert (result.exit_code, result.output) == (0, "")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["serve", "--config", "demo", "--broker", "mosquito"], 78, "auto, mosquitto, embedded"),
        (["serve", "--config", "demo", "--broker", "http://host"], 78, "mqtt://"),
        (["serve", "--config", "dmo"], 78, "'demo'"),
        (["serve", "--config", "demo", "--set", "evaluation.data=nowhere"], 66, "nowhere"),
        (["export", "--state", "nowhere", "--out", "x"], 73, "no run"),
        (["serve"], 2, "--config"),
    ],
)
def test_what_cannot_be_is_explained(run, tmp_path, arguments, code, says):
    state = ["--state", tmp_path / "state"] if arguments[0] == "serve" else []
    result = run(*arguments, *state)
    assert result.exit_code == code
    assert says in result.output


def test_nothing_to_export_yet():
    with pytest.raises(StateError, match="nothing to export yet"):
        choose({}, None)
