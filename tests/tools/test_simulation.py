"""Simulated fleets with the real training processes, on images that are there with the packages."""

import json
import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from lwfed.cloud_server.store import open_store
from lwfed.errors import ConfigError, StateError, WorkerFailed
from lwfed.tools.cli import main
from lwfed.tools.endings import ENDINGS
from lwfed.tools.simulation.command import Simulation, plan, run_one, simulate
from lwfed.tools.simulation.device import drops_out

SEED = 139  # which draws all that can happen to a round
TINY = (
    "model.image_size=8", "model.width=8", "model.depth=1", "model.heads=2", "ssl.hidden_dim=8", "ssl.output_dim=4",
    "stages.rounds_per_stage=3", "train.epochs=1", "train.batch_size=128", "data.devices=3", "data.partition=even",
    "rounds.sample=2", "rounds.quorum=0.5", "calibration.every=never", "evaluation.probe=false",
)  # fmt: skip
FIGURES = {"loss", "knn", "probe", "worker_peak_mb", "worker_baseline_mb", "bytes_down", "bytes_up", "seconds"}


def told(out, *settings, **more):
    options = {"data": "digits", "dropout": 0.4, "seeds": (SEED,), "strategies": None, "workers": 1, "device": "cpu", **more}
    return Simulation("demo", (*TINY, *settings), out, **options)


class Listener:
    """In place of a screen; may end the simulation, as Ctrl-C would, when it has heard enough."""

    def __init__(self, ends_at=None):
        self.said, self.ends_at = [], ends_at

    def show(self, program, said):
        self.said.append((program, said))
        if self.ends_at is not None and self.ends_at(program, said):
            self.ends_at = None
            os.kill(os.getpid(), signal.SIGINT)

    def run(self, config, done=0):
        self.done = done
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    simulate(told(out))
    return out


def report(out):
    return json.loads((out / "report.json").read_text())


def test_the_report_holds_what_was_measured(undisturbed):
    found = report(undisturbed)
    (run,) = found["runs"]
    assert set(run["stages"][0]) == FIGURES | {"stage", "metrics", "features", "collapsed"}
    assert (run["strategy"], run["seed"], found["seeds"]) == ("layer_wise", SEED, [SEED])
    assert 0 < run["stages"][0]["knn"] <= 1
    assert run["random"]["knn"] < run["raw_pixels"]["knn"]
    assert run["stages"][0]["bytes_up"] > 0
    assert found["summary"]["layer_wise"]["total"]["knn"] == {"mean": run["stages"][0]["knn"], "spread": 0.0}
    with Image.open(undisturbed / "curves.png") as picture:
        assert picture.format == "PNG"
    assert run["encoder_sha256"] in (undisturbed / "report.md").read_text()


def test_drop_out_blocks_no_round(undisturbed):
    """Of the two that are chosen one drops out of round 1, both of round 2, in which the third is asked. Out of round 3 all do,
    the third included, and are back when it was due."""
    (run,) = report(undisturbed)["runs"]
    drops = [[drops_out(SEED, 1, round, device, 0.4) for device in range(3)] for round in (1, 2, 3)]
    assert [sum(of_round) for of_round in drops] == [1, 2, 3]
    assert [(one["chosen"], one["contributed"]) for one in run["rounds"]] == [(2, 1), (3, 1), (3, 3)]


@pytest.fixture
def endings():
    """None is ignored, as after nohup, before; and a simulation that was ended ignores further ones, as its process is to end."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDINGS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupted(out, *settings):
    """Ended when the first of those that had dropped out of round 3 is done after the deadline, and the others are not; then finished."""
    listener = Listener(lambda program, said: said["event"] == "contribution" and said["round"] == 3)
    ((folder, config),) = plan(told(out, *settings)).items()
    with pytest.raises(SystemExit) as ended:
        run_one(config, folder, told(out, *settings), listener)
    assert ended.value.code == 130
    assert listener.done == 0
    simulate(told(out, *settings))
    return out


def test_an_interrupted_simulation_goes_on_to_the_same_bits(undisturbed, tmp_path, endings):
    same_bits(undisturbed, interrupted(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["transfer.codec=int8"], ["transfer.codec=int8", "transfer.top_k=0.1"], ["transfer.codec=bf16"]])
def test_with_differences_too(tmp_path, settings, endings):
    simulate(told(tmp_path / "undisturbed", *settings))
    same_bits(tmp_path / "undisturbed", interrupted(tmp_path / "interrupted", *settings))


@pytest.mark.slow
def test_devices_of_a_killed_simulation_build_upon_what_the_server_has_of_them(tmp_path, endings):
    """They last wrote down what they know when the round began; the one that contributed then trains again in round 3."""
    simulate(told(tmp_path / "undisturbed", "transfer.codec=int8"))
    out, held = tmp_path / "killed", []
    ((folder, config),) = plan(told(out, "transfer.codec=int8")).items()

    def contributed(program, said):
        if ends := said["event"] == "contribution" and said["round"] == 1:
            held.append((folder / "devices.json").read_bytes())
        return ends

    with pytest.raises(SystemExit):
        run_one(config, folder, told(out, "transfer.codec=int8"), Listener(contributed))
    (folder / "devices.json").write_bytes(held[0])
    simulate(told(out, "transfer.codec=int8"))
    same_bits(tmp_path / "undisturbed", out)


def same_bits(undisturbed, interrupted):
    (first,), (second,) = report(undisturbed)["runs"], report(interrupted)["runs"]
    same = ("encoder_sha256", "random", "raw_pixels")
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    assert [one["loss"] for one in first["rounds"]] == [one["loss"] for one in second["rounds"]]
    assert first["stages"][0]["bytes_down"] == pytest.approx(second["stages"][0]["bytes_down"], rel=0.1)


@pytest.mark.slow
def test_over_selection_takes_the_same_devices_however_fast_their_processes_are(tmp_path):
    found = []
    for workers in (1, 3):
        out = tmp_path / str(workers)
        simulate(told(out, "rounds.oversample=1.5", "stages.rounds_per_stage=2", "data.devices=4", dropout=0.25, workers=workers))
        (run,) = report(out)["runs"]
        found.append((run["encoder_sha256"], contributors(out)))
    assert found[0] == found[1]
    assert [round for round, _ in found[0][1]] == [1, 1, 2, 2]
    assert {participant for _, participant in found[0][1]} - {0, 1}, "not those that are asked first"


def contributors(out):
    store = open_store(next(out.glob("**/run.sqlite")).parent, "demo")
    try:
        return [(one.round, one.participant) for one in store.contributions()]
    finally:
        store.close()


def test_a_finished_simulation_is_not_made_again(undisturbed):
    before = report(undisturbed)
    listener = Listener()
    ((folder, config),) = plan(told(undisturbed)).items()
    assert run_one(config, folder, told(undisturbed), listener)["encoder_sha256"] == before["runs"][0]["encoder_sha256"]
    assert listener.said == []


@pytest.mark.parametrize(
    ("settings", "more", "says"),
    [(["train.lr=1"], {}, "train.lr: "), ([], {"dropout": 0.1}, "--dropout 0.4, not 0.1")],
)
def test_a_folder_with_another_simulation_is_refused(undisturbed, settings, more, says):
    with pytest.raises(StateError, match=says):
        simulate(told(undisturbed, *settings, **more))


def test_a_fleet_that_cannot_train_ends_with_the_reason(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(30):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    with pytest.raises(WorkerFailed, match="round 1 cannot go on: 0 updates"):
        simulate(told(tmp_path / "out", "data.min_images=20", data=str(tmp_path / "photos"), dropout=0.0))


def test_draws_depend_on_seed_and_place_alone_and_have_their_probability():
    draws = [drops_out(0, 1, round, device, 0.25) for round in range(50) for device in range(100)]
    assert draws == [drops_out(0, 1, round, device, 0.25) for round in range(50) for device in range(100)]
    assert draws != [drops_out(1, 1, round, device, 0.25) for round in range(50) for device in range(100)]
    assert 0.23 < sum(draws) / len(draws) < 0.27
    assert not any(drops_out(0, 1, 1, device, 0.0) for device in range(1000))


def test_every_strategy_and_seed_has_a_folder_and_equal_local_epochs(tmp_path):
    runs = plan(told(tmp_path, "model.depth=2", seeds=(0, 1), strategies=("layer_wise", "end_to_end")))
    assert [folder.relative_to(tmp_path) for folder in runs] == [
        Path(strategy) / f"seed-{seed}" for strategy in ("layer_wise", "end_to_end") for seed in (0, 1)
    ]
    assert {sum(config.round_counts) for config in runs.values()} == {6}
    assert {config.rounds.min_devices for config in runs.values()} == {3}


@pytest.mark.parametrize("setting", ["run.seed=1", "rounds.min_devices=1", "worker.device=cpu"])
def test_settings_that_options_decide_on_are_refused(tmp_path, setting):
    with pytest.raises(ConfigError, match="for a simulation"):
        plan(told(tmp_path, setting))


def test_options_are_checked_by_the_command_line():
    for words in (["--seeds", "1,x"], ["--strategies", "layerwise"], ["--dropout", "1"]):
        assert CliRunner().invoke(main, ["simulate", "demo", "--data", "digits", *words]).exit_code == 2
