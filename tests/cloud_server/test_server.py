"""A run in a fleet of simulated devices: undisturbed, disturbed, killed."""

import json
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from lwfed.cloud_server.course import Course
from lwfed.cloud_server.overview import overview
from lwfed.errors import StateError
from lwfed.models.shapes import shapes
from lwfed.transport.memory import Faults
from lwfed.wire import messages

from .fleets import of, undisturbed
from .world import NumpyWorker

RESULTS = {}  # of runs that nothing disturbs


@pytest.fixture
def result(world):
    """The encoder of such a run, which is made once."""

    def result(*settings, collapses=None):
        key = settings, None if collapses is None else frozenset(collapses)
        if key not in RESULTS:
            RESULTS[key] = undisturbed(world, *settings, collapses=collapses).finish()
        return RESULTS[key]

    return result


def unreliable(random):
    """Loses and doubles what the machines repeat; who is there is said once, and arrives."""

    def copies(client, topic, payload):
        if topic.rsplit("/", 1)[1] in ("state", "hello"):
            return 1
        return random.choices([0, 1, 2], [0.05, 0.9, 0.05])[0]

    return copies


def test_a_run_from_first_device_to_encoder(world, said):
    fleet = undisturbed(world)
    encoder = load(fleet.finish())
    config = fleet.config
    assert encoder.keys() == shapes(config, ["stem", "layer.1", "layer.2", "norm"]).keys()
    assert [device.tasks for device in fleet.devices] == [[(1, 1), (1, 2), (2, 1), (2, 2)]] * 2
    rounds = ["aggregate", "calibrate"] * 2
    assert fleet.jobs == ["prepare", "evaluate", *rounds, "evaluate", "prepare", *rounds, "evaluate"]
    assert {(one["stage"], one["name"]) for one in of(said, "evaluation")} == {
        (0, "random"), (0, "raw_pixels"), (1, "trained"), (2, "trained"),
    }  # fmt: skip
    assert [(one["stage"], one["round"]) for one in of(said, "round", status="closed", devices=2)] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    ended = of(said, "stage", status="ended")[1]
    assert (ended["worker_peak_mb"], ended["worker_baseline_mb"], ended["knn"]) == (300, 200, 0.5)
    assert (ended["bytes_down"], ended["bytes_up"]) == (200, 20)
    assert len(fleet.course.store.contributions()) == 8
    assert not of(said, "warning")


def test_the_model_is_the_weighted_mean_of_the_updates(world):
    fleet = world("transfer.codec=fp32", "calibration.every=never", "stages.rounds_per_stage=1", "stages.strategy=end_to_end")
    fleet.start()
    sent = []
    for name in ("a", "b"):
        fleet.join(name, spoil=lambda update: sent.append(update) or update)
    fleet.settle(until=lambda: fleet.course.state.round == 2)
    name = "blocks.1.mlp.fc1.weight"
    by_weight = sorted((update[name] for update in sent[:2]), key=lambda tensor: not np.array_equal(tensor, sent[0][name]))
    part = fleet.course.blobs.read(fleet.course.state.parts["layer.2"])
    mean = (by_weight[0].astype(float) * 1 + by_weight[1].astype(float) * 2) / 3
    assert np.allclose(load(part)[name], mean, atol=1e-6)


def test_l_dawa_measures_angles_to_what_the_devices_received(world):
    settings = ("calibration.every=never", "stages.strategy=end_to_end", "rounds.min_devices=1")
    fleet = world("transfer.codec=fp32", "aggregation.rule=l_dawa", *settings)
    fleet.start()
    sent, received = [], []
    name = "blocks.1.mlp.fc1.weight"

    def spoil(update):
        sent.append(update[name].astype(float))
        received.append(load(fleet.course.blobs.read(fleet.course.state.parts["layer.2"]))[name].astype(float))
        return update

    fleet.join("a", spoil=spoil)
    fleet.settle(until=lambda: len(sent) == 3)
    for update, before, after in zip(sent, received, received[1:], strict=False):
        cosine = (update * before).sum() / (np.linalg.norm(update) * np.linalg.norm(before))
        assert np.allclose(after, cosine * update, atol=1e-6)


def test_the_server_answers_while_updates_are_aggregated(world, monkeypatch):
    held, send = [], NumpyWorker.send
    monkeypatch.setattr(
        NumpyWorker, "send", lambda worker, job: held.append((worker, job)) if job["do"] == "aggregate" else send(worker, job)
    )
    fleet = undisturbed(world)
    fleet.settle(until=lambda: held)
    fleet.join("late")
    fleet.settle(until=lambda: len(fleet.course.state.devices) == 3)
    assert fleet.course.state.phase == "aggregating"
    monkeypatch.undo()
    NumpyWorker.send(*held[0])
    fleet.finish()


def test_a_poisoned_update_is_left_out_and_named(world, said):
    fleet = world("aggregation.rule=multi_krum", "aggregation.byzantine=1", "aggregation.clip_norm=100", "rounds.min_devices=5")
    fleet.start()
    for name in "abcd":
        fleet.join(name)
    fleet.join(
        "e", images=10**12, loss=lambda *_: 500.0, spoil=lambda update: {key: value + np.float32(5) for key, value in update.items()}
    )
    fleet.settle(until=lambda: fleet.course.state.round == 2)
    assert fleet.course.state.losses == {1: 1.0}, "one device decides on no loss either"
    encoder = load(fleet.finish())
    assert max(abs(value).max() for value in encoder.values()) < 50
    found = of(said, "screened")
    poisoned = next(device.done_task.participant for device in fleet.devices if device.name == "e")
    assert [(one["stage"], one["round"]) for one in found] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for one in found:
        assert poisoned in one["left_out"]
        assert len(one["left_out"]) == 3
        assert list(one["clipped"]) == [str(poisoned)]
        assert f"clipped device {poisoned}, down to 0." in one["text"]
    assert not of(said, "warning")
    told = json.loads(overview(fleet.root / "server", as_json=True))
    assert [(one["updates"], one["left_out"]) for one in told["rounds"]] == [(5, one["left_out"]) for one in found]
    times = {device["participant"]: device["left_out"] for device in told["devices"]}
    assert (times[poisoned], sum(times.values())) == (4, 12)
    status = overview(fleet.root / "server")
    assert "left out    stage 2, updates from round 1 on: 3 of 5, 3 of 5\n" in status
    (line,) = [line for line in status.splitlines() if line.startswith(f"device {poisoned} ")]
    assert line.endswith("; left out of 4 rounds")


@pytest.mark.parametrize(("devices", "instead"), [("ab", "the model stays as it was"), ("abc", "the median is taken instead")])
def test_too_few_updates_for_krum_do_not_end_a_run(world, said, devices, instead):
    settings = ("aggregation.rule=krum", "aggregation.byzantine=1", f"rounds.min_devices={len(devices)}", "calibration.every=never")
    fleet = world(*settings)
    fleet.start()
    for name in devices:
        fleet.join(name)
    fleet.finish()
    place = f"aggregation.byzantine 1 needs 5 updates and has {len(devices)}"
    assert [one["text"] for one in of(said, "warning")] == [f"warning     round {n}: krum with {place}: {instead}" for n in (1, 2)] * 2
    models = {tuple(one.parts.items()) for one in fleet.announced if one.stage == 1 and one.phase == "training"}
    assert len(models) == (1 if devices == "ab" else 2)


def test_the_waiting_server_names_the_command_that_joins(world, said):
    fleet = world()
    fleet.start()
    fleet.quiet()
    waiting = of(said, "waiting")[-1]
    assert (waiting["devices"], waiting["needed"]) == (0, 2)
    assert "0 of 2 devices are here; start one with: edge-agent join mqtt://127.0.0.1:1883 --data" in waiting["text"]
    fleet.join("a")
    assert "1 of 2 devices is here; " in of(said, "waiting")[-1]["text"]


REPEATED = ("stages.on_collapse=repeat", "train.lr_schedule=plateau", "train.plateau_rounds=1", "aggregation.rule=l_dawa")


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000), kills=st.sets(st.integers(1, 60), max_size=4), repeated=st.booleans())
@example(seed=685, kills=set(), repeated=False)  # an update of the last round, offered again, passed for work on the present one
def test_faults_and_kills_change_no_bit(world, result, seed, kills, repeated):
    options, collapses = (REPEATED, {(2, 1)}) if repeated else ((), None)
    expected = result(*options, collapses=collapses)
    fleet = world(*options, faults=Faults(seed, reorder=0.1))
    fleet.collapses = collapses
    fleet.broker.interfere = unreliable(Random(seed))
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name)
    steps = 0

    def until():
        nonlocal steps
        steps += 1
        if steps in kills and not fleet.course.state.over:
            fleet.kill()
            fleet.start()
        return fleet.course.state.over

    fleet.settle(until)
    assert fleet.finish() == expected
    assert len(fleet.course.store.contributions()) == (12 if repeated else 8)


class Killed(BaseException):
    pass


def killed():
    raise Killed


PHASES = ["preparing", "evaluating", "waiting", "training", "aggregating", "calibrating"]


KILLED_IN = [*((1, phase) for phase in PHASES), (2, "preparing"), (2, "evaluating"), (2, "finished")]


@pytest.mark.parametrize(
    ("stage", "phase", "codec"), [*((*place, "fp32") for place in KILLED_IN), (1, "aggregating", "int8"), (1, "calibrating", "int8")]
)
def test_a_server_killed_in_any_phase_goes_on_with_the_same_result(world, result, stage, phase, codec):
    expected = result(f"transfer.codec={codec}")
    fleet = world(f"transfer.codec={codec}")
    fleet.start()
    for name in ("a", "b"):
        fleet.bring(name)
    if phase == "aggregating":  # the worker is as quick as we are: we die before it is given anything
        fleet.course.to_merge = killed
    try:
        while (fleet.course.state.stage, fleet.course.state.phase) != (stage, phase):
            fleet.step()
    except Killed:
        pass
    assert (fleet.course.store.state.stage, fleet.course.store.state.phase) == (stage, phase)
    before = fleet.course.epoch
    fleet.kill()
    fleet.start()
    assert fleet.course.resumed
    assert fleet.finish() == expected
    assert messages.decode(messages.Run, fleet.broker.retained["lwfed/default/all/run"]).epoch == fleet.course.epoch > before


@pytest.mark.parametrize(("codec", "spoilt"), [("fp32", 1), ("int8", 1), ("int8", 2)])
def test_updates_that_rot_before_they_are_aggregated_are_left_out(world, said, codec, spoilt):
    """Their devices have forgotten them. Without those of both devices the round changes nothing."""
    fleet = undisturbed(world, f"transfer.codec={codec}", "calibration.every=never")
    fleet.course.to_merge = killed
    with pytest.raises(Killed):
        fleet.finish()
    stored = fleet.course.store.contributions(1, 1)
    for one in stored[:spoilt]:
        fleet.course.spool.path(one.blob).write_bytes(b"junk")
    fleet.kill()
    fleet.start()
    fleet.finish()
    first, second = (next(run.parts for run in fleet.announced if (run.round, run.phase) == (round, "training")) for round in (1, 2))
    assert (first == second) == (spoilt == len(stored) == 2)
    told = [one["text"] for one in of(said, "warning")]
    assert len(told) == 1
    assert f"updates of device{'s 0, 1' if spoilt == 2 else ' 0'} are damaged on this disk" in told[0]


def test_devices_that_stayed_follow_the_next_run_in_another_state(world, said):
    fleet = undisturbed(world)
    fleet.kill()
    fleet.start()
    fleet.finish()
    fleet.kill()
    fleet.now += 1  # so long at least does a server take to start
    fleet.state = "second"
    (fleet.root / fleet.state).mkdir()
    fleet.config = fleet.config.model_copy(update={"run": fleet.config.run.model_copy(update={"name": "second"})})
    fleet.start()
    fleet.finish()
    assert [device.tasks for device in fleet.devices] == [[(1, 1), (1, 2), (2, 1), (2, 2)] * 2] * 2


def test_the_server_asks_the_weights_themselves_what_a_backbone_consists_of(world, said):
    fleet = world(
        "model.backbone=mobilenetv3_small_100", "model.depth=6", "model.width=576", "model.image_size=32", "model.channels=3",
        "stages.layers_per_stage=[5, 1]", "stages.rounds_per_stage=1", "rounds.min_devices=1", "transfer.chunk_bytes=122880",
    )  # fmt: skip
    fleet.start()
    fleet.join("a")
    layers, heads = [f"layer.{number}" for number in range(1, 7)], {"projector", "predictor"}
    assert load(fleet.finish()).keys() == shapes(fleet.config, ["stem", *layers]).keys()
    announced = {run.stage: set(run.parts) for run in fleet.announced if run.phase == "training"}
    assert announced[1] == {"stem", *layers[:5], "adapter.5", *heads}
    assert announced[2] == {"stem", *layers, *heads}
    assert {place: "adapter.5" in parts for place, parts in fleet.course.store.checkpoints().items()} == {(1, 1): True, (2, 1): False}
    assert of(said, "warning") == []


def scales(fleet):
    """(stage, round) -> the parts of the rate that were announced for it."""
    found = {}
    for run in fleet.announced:
        if run.phase == "training":
            found.setdefault((run.stage, run.round), set()).add(run.lr_scale)
    return found


def test_the_rate_that_plateaus_leave_reaches_devices_and_calibration(world, said):
    fleet = world("train.lr_schedule=plateau", "train.plateau_rounds=1", "stages.rounds_per_stage=4", "rounds.min_devices=1")
    fleet.start()
    fleet.join("a", loss=lambda stage, round: {2: 3.0, 3: 1.0}.get(round, 2.0))
    fleet.finish()
    one_stage = [1.0, 1.0, 0.5, 0.5]
    assert scales(fleet) == {(stage, round): {one_stage[round - 1]} for stage in (1, 2) for round in range(1, 5)}
    assert [order["lr_scale"] for order in fleet.orders if order["do"] == "calibrate"] == one_stage * 2
    assert [(one["stage"], one["round"], one["lr_scale"]) for one in of(said, "reduced")] == [(1, 2, 0.5), (2, 2, 0.5)]


def test_a_stage_that_stalls_ends_early(world, said):
    settings = ("stages.advance=plateau", "stages.patience=2", "stages.rounds_per_stage=9", "calibration.every=stage")
    fleet = world(*settings, "rounds.min_devices=1")
    fleet.start()
    device = fleet.join("a", loss=lambda stage, round: -round if stage == 2 else max(-round, -2))
    fleet.finish()
    assert device.tasks == [*((1, round) for round in range(1, 5)), *((2, round) for round in range(1, 10))]
    assert {run.rounds for run in fleet.announced} == {9}
    assert [(order["stage"], order["round"]) for order in fleet.orders if order["do"] == "calibrate"] == [(1, 4), (2, 9)]
    assert [(one["stage"], one["round"]) for one in of(said, "stalled")] == [(1, 4)]


def test_calibration_every_second_round(world, said):
    fleet = undisturbed(world, "calibration.every=2", "stages.rounds_per_stage=3")
    fleet.finish()
    assert [(one["stage"], one["round"]) for one in of(said, "calibration")] == [(1, 2), (2, 2)]


def test_a_collapse_is_warned_of_and_stands_in_the_status(world, said):
    fleet = undisturbed(world, collapses={(1, 1)})
    fleet.finish()
    assert [(one["stage"], one["reaction"]) for one in of(said, "collapse")] == [(1, "warn")]
    assert [(one["stage"], one["collapsed"], one["rank"]) for one in of(said, "judgement")] == [(1, True, 5.0), (2, False, 5.0)]
    status = overview(fleet.root / "server")
    assert "stage 1     features: spread 0.900, effective rank 5.0, collapsed\n" in status
    assert "stage 2     features: spread 0.900, effective rank 5.0\n" in status


def test_a_stage_that_collapsed_is_trained_again_from_other_weights_in_rounds_of_their_own(world, said):
    fleet = undisturbed(world, "stages.on_collapse=repeat", "stages.layer_init=copy", collapses={(2, 1), (2, 2)})
    fleet.settle(until=lambda: fleet.course.state.attempt == 2)
    assert (2, 2) not in fleet.course.store.checkpoints()
    assert (fleet.course.state.phase, fleet.course.state.round) == ("training", 3)
    assert {part: blob for part, blob in fleet.course.state.parts.items() if part != "layer.2"} == fleet.course.state.start
    fleet.finish()
    assert fleet.devices[0].tasks == [(1, 1), (1, 2), *((2, round) for round in range(1, 7))]
    prepared = [(order["stage"], order["attempt"], bool(order["parts"])) for order in fleet.orders if order["do"] == "prepare"]
    assert prepared == [(1, 1, False), (2, 1, True), (2, 2, False), (2, 3, False)]
    assert {run.rounds for run in fleet.announced if (run.stage, run.round) == (2, 5)} == {6}
    assert list(fleet.course.store.checkpoints()) == [(1, 2), (2, 6)]
    assert [one["attempt"] for one in of(said, "stage", status="started", stage=2)] == [1, 2, 3]
    assert [one["stage"] for one in of(said, "stage", status="ended")] == [1, 2]
    assert "trained again from other weights, attempt 3 of 3" in of(said, "collapse")[1]["text"]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_stops_leaves_the_encoder_of_the_last_sound_stage(world, said, stage):
    fleet = undisturbed(world, "stages.on_collapse=stop", collapses={(stage, 1)})
    fleet.settle(until=lambda: fleet.course.state.over)
    fleet.quiet()
    (stopped,) = of(said, "stopped")
    assert f"stage {stage} collapsed: its features are all alike" in stopped["text"]
    assert fleet.announced[-1].phase == "stopped"
    assert stopped["stage"] == stage - 1
    assert of(said, "finished") == []
    if stage == 2:
        sound = load(fleet.course.encoder_path.read_bytes())
        assert not any(name.startswith("blocks.1.") for name in sound)
    else:
        assert stopped["encoder"] is None
        assert not fleet.course.encoder_path.exists()
    fleet.kill()
    fleet.start()
    fleet.quiet()
    assert fleet.course.state.phase == "stopped"
    assert len(fleet.devices[0].tasks) == 2 * stage


def test_another_configuration_in_the_same_state_is_refused(world, tiny):
    fleet = undisturbed(world)
    with pytest.raises(StateError, match=r"train\.lr: 0\.01 before, 0\.5 now\n.*another --state"):
        Course(tiny("train.lr=0.5"), fleet.root / "server")


def test_until_done_ends_when_the_last_announcement_is_out(world):
    fleet = world()
    fleet.start(until_done=True)
    for name in ("a", "b"):
        fleet.join(name)
    fleet.settle(until=lambda: fleet.server.over)
    fleet.server.end()
    fleet.broker.pump()
    assert messages.decode(messages.Run, fleet.broker.retained["lwfed/default/all/run"]).phase == "finished"
    assert not messages.decode_server_state(fleet.broker.retained["lwfed/default/srv/state"]).online
