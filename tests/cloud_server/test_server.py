"""The server in a fleet of simulated devices: undisturbed, disturbed, killed, and lied to."""

import json
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from lwfed.cloud_server.course import Course
from lwfed.cloud_server.overview import overview
from lwfed.errors import ConfigError, PortInUse, Refused, StateError, Unreachable
from lwfed.models.shapes import shapes
from lwfed.transport.base import Disconnected
from lwfed.transport.memory import Faults, MemoryTransport
from lwfed.wire import messages

HELLO = messages.Hello(boot=1, lwfed="0", python="3", torch="2", machine="x86_64", cores=1, memory_mb=100, images=10, source="folder")


def undisturbed(world, *settings, collapses=None):
    fleet = world(*settings)
    fleet.collapses = collapses
    fleet.start()
    for name in ("a", "b"):
        fleet.join(name)
    return fleet


def unreliable(random):
    """Loses and doubles what the machines repeat; who is there is said once, and arrives."""

    def copies(client, topic, payload):
        if topic.rsplit("/", 1)[1] in ("state", "hello"):
            return 1
        return random.choices([0, 1, 2], [0.05, 0.9, 0.05])[0]

    return copies


def of(said, event, **fields):
    return [one for one in said if one["event"] == event and all(one.get(key) == value for key, value in fields.items())]


def test_a_run_from_first_device_to_encoder(world, said):
    fleet = undisturbed(world)
    encoder = load(fleet.finish())
    config = fleet.config
    assert encoder.keys() == shapes(config, ["stem", "layer.1", "layer.2", "norm"]).keys()
    assert [device.tasks for device in fleet.devices] == [[(1, 1), (1, 2), (2, 1), (2, 2)]] * 2
    assert fleet.jobs == ["prepare", "evaluate", "calibrate", "calibrate", "evaluate", "prepare", "calibrate", "calibrate", "evaluate"]
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
    fleet = world("calibration.every=never", "stages.rounds_per_stage=1", "stages.strategy=end_to_end")
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
    fleet = world("aggregation.rule=l_dawa", "calibration.every=never", "stages.strategy=end_to_end", "rounds.min_devices=1")
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
def test_faults_and_kills_change_no_bit(world, seed, kills, repeated):
    options, collapses = (REPEATED, {(2, 1)}) if repeated else ((), None)
    expected = undisturbed(world, *options, collapses=collapses).finish()
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


@pytest.mark.parametrize(("stage", "phase"), [*((1, phase) for phase in PHASES), (2, "preparing"), (2, "evaluating"), (2, "finished")])
def test_a_server_killed_in_any_phase_goes_on_with_the_same_result(world, stage, phase):
    expected = undisturbed(world).finish()
    fleet = world()
    fleet.start()
    for name in ("a", "b"):
        fleet.bring(name)
    if phase == "aggregating":  # is left within the event that begins it: we die in the middle of that
        fleet.course.aggregate = killed
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


def test_an_update_that_does_not_fit_is_refused_and_harms_nobody(world, said):
    def poisoned(update):
        return {name: np.full_like(value, np.nan) for name, value in update.items()}

    expected = None
    for spoil in (poisoned, lambda update: {**update, "extra": np.zeros(1, np.float32)}, lambda update: dict(list(update.items())[1:])):
        fleet = world("rounds.quorum=0.5", "rounds.min_devices=2")
        fleet.start()
        fleet.join("honest")
        liar = fleet.join("liar", spoil=spoil)
        result = fleet.finish()
        assert expected in (None, result)
        expected = result
        assert set(liar.refusals) <= {"content", "not_finite"}
        assert len(liar.refusals) == 4
        assert liar.tasks == [(1, 1), (1, 2), (2, 1), (2, 2)]
        assert {one.participant for one in fleet.course.store.contributions()} == {0}
        assert not list((fleet.root / "server" / "updates").glob("*-*"))
    assert of(said, "warning")


def test_an_update_larger_than_the_plan_allows_is_not_even_received(world):
    fleet = world()
    fleet.start()
    fleet.join("honest")
    big = fleet.join("big", spoil=lambda update: {**update, "extra": np.zeros(100_000, np.float32)})
    fleet.settle(until=lambda: big.refusals != [])
    assert big.refusals == ["too_large"]


def test_malformed_messages_are_counted_said_once_and_ignored(world, said):
    fleet = world()
    fleet.start()
    device = fleet.join("odd")
    for payload in (b"\xff", b"{}", b"[" * 5000, b'{"v": 1, "blobs": 3}'):
        for kind in ("need", "offer", "fin", "beat", "fail", "nonsense"):
            device.transport.publish(fleet.server._topics.from_device("odd", kind), payload)
    fleet.quiet()
    assert len(of(said, "warning")) == 5
    fleet.join("even")
    fleet.finish()


def test_a_device_of_another_version_is_told_so(world, said):
    fleet = world()
    fleet.start()
    device = fleet.join("old")
    device.transport.publish(fleet.server._topics.from_device("old", "hello"), json.dumps({"v": 2}).encode())
    fleet.quiet()
    assert device.refusals == ["version"]
    assert "protocol version 2" in of(said, "warning")[0]["text"]


def test_an_agent_that_starts_again_is_no_second_one(world, said):
    fleet = undisturbed(world)
    device = fleet.devices[0]
    fleet.broker.cut(device.name)
    fleet.quiet()
    device.restart()
    fleet.quiet()
    device.tell("state", messages.State(state="lost", boot=1))
    fleet.kill()
    fleet.broker.retained["lwfed/default/d/a/up/state"] = messages.encode(messages.State(state="ready", boot=1))  # from before a power cut
    fleet.start()
    fleet.finish()
    assert of(said, "warning") == []
    assert {device.doubled_s for device in fleet.course.store.devices()} == {None}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("hello", HELLO.model_copy(update={"boot": 1})),
        ("hello", HELLO.model_copy(update={"boot": 2, "machine": "aarch64"})),
        ("state", messages.State(state="training", boot=1)),
    ],
)
def test_two_agents_with_one_identity_are_told_apart_and_told(world, said, kind, message):
    fleet = world()
    fleet.start()
    device = fleet.join("copied")
    device.restart()
    fleet.quiet()
    for _ in range(3):  # a broker that does not throw one of them out lets both speak
        device.tell(kind, message)
    fleet.quiet()
    (warning,) = of(said, "warning")
    assert "two agents are device 0 (copied)" in warning["text"]
    assert "delete its --state" in warning["text"]
    assert fleet.course.store.devices()[0].doubled_s is not None
    assert "device 0 " in overview(fleet.root / "server")
    assert "two agents were this device at " in overview(fleet.root / "server")


def test_a_device_with_too_few_images_is_not_asked(world, said):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    poor = fleet.join("poor", images=3)
    assert fleet.course.state.phase == "waiting"
    fleet.join("rich")
    fleet.finish()
    assert poor.tasks == []
    assert "data.min_images is 8" in of(said, "warning")[0]["text"]


@pytest.mark.parametrize("code", ["data", "unfit"])
@pytest.mark.parametrize("restarted", [False, True])
def test_a_device_without_images_or_memory_is_left_out_until_it_starts_anew(world, said, restarted, code):
    fleet = world("rounds.quorum=0.5")
    fleet.start()
    fleet.join("rich")
    poor = fleet.join("poor", fails=1, code=code)
    fleet.settle(until=lambda: of(said, "round", status="closed") != [])
    assert f"device 1 cannot train in this round ({code}): out of {code}; it is not asked again" in of(said, "warning")[0]["text"]
    if restarted:
        poor.restart()
    fleet.finish()
    assert poor.tasks[-1] == ((2, 2) if restarted else (1, 1))
    assert fleet.now < 30
    assert len(of(said, "warning")) == 1


def test_what_made_a_device_unfit_outlives_its_connection(world, said):
    fleet = world("rounds.quorum=0.5")
    fleet.start()
    fleet.join("rich")
    poor = fleet.join("poor", fails=1, code="data")
    fleet.settle(until=lambda: of(said, "round", status="closed") != [])
    fleet.broker.cut("poor")
    fleet.finish()
    assert poor.tasks == [(1, 1)]


def test_a_round_is_not_held_open_by_a_device_without_images(world, said):
    fleet = world("rounds.quorum=1")
    fleet.start()
    fleet.join("rich")
    poor = fleet.join("poor", fails=1, code="data")
    fleet.settle(until=lambda: of(said, "round", status="closed") != [])
    assert fleet.now < 30
    fleet.join("another")
    fleet.finish()
    assert poor.tasks == [(1, 1)]


def test_an_acknowledged_update_offered_again_is_acknowledged_again(world):
    fleet = world("rounds.quorum=1")
    fleet.start()
    first, _ = fleet.join("first"), fleet.join("second")
    fleet.settle(until=lambda: first.upload is not None and first.upload.state == "done")
    before = fleet.course.store.contributions()
    first.upload = type(first.upload)(first.topics, "first", first.upload._offer, first.spool, 3)
    fleet.settle(until=lambda: first.upload.state == "done")
    assert [one.id for one in fleet.course.store.contributions()][: len(before)] == [one.id for one in before]
    fleet.finish()
    assert len(fleet.course.store.contributions()) == 8


def test_a_device_that_goes_for_good_is_not_waited_for_in_any_round(world, said):
    fleet = world("rounds.quorum=0.5")
    fleet.start()
    fleet.join("stays")
    goes = fleet.join("goes", spoil=lambda update: goes.tell("state", goes.state("stopped"), retain=True) or update)
    fleet.settle(until=lambda: of(said, "device", participant=1, status="has left") != [])
    fleet.devices.remove(goes)
    goes.transport.close()
    fleet.finish()
    assert [one["devices"] for one in of(said, "round", status="closed")] == [1] * 4
    assert fleet.now < 30  # neither a deadline nor the patience for those who may return


def test_a_lost_device_costs_its_round_until_the_deadline_only(world, said):
    fleet = world("rounds.quorum=0.5")
    fleet.start()
    fleet.join("stays")
    lost = fleet.join("lost")
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    fleet.devices.remove(lost)
    fleet.broker.cut("lost", reconnect=False)
    fleet.settle(until=lambda: of(said, "round", status="closed") != [])
    assert 100 <= fleet.now < 110
    fleet.finish()
    assert "has not come back" in " ".join(one["text"] for one in of(said, "warning"))


def test_a_device_that_failed_is_asked_again_after_the_deadline(world, said):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    device = fleet.join("moody", fails=1)
    fleet.settle(until=lambda: len(device.tasks) >= 2)
    assert fleet.now >= 100
    assert "out of memory" in of(said, "warning")[0]["text"]
    fleet.finish()


def test_a_device_that_was_mended_and_started_again_is_asked_at_once(world, said):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    device = fleet.join("mended", fails=1)
    fleet.settle(until=lambda: len(device.tasks) == 1 and device.task is None)
    fleet.quiet()
    text = "no device can train in this round: device 0 failed; mend one and start it again"
    assert [one["text"].split("warning")[1].strip() for one in of(said, "warning")][1:] == [text]
    device.restart()
    fleet.finish()
    assert fleet.now < 30
    assert len(device.tasks) == 5


def test_a_device_whose_update_was_refused_is_asked_again_when_it_was_started_again(world, said):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    wrong = fleet.join("wrong", spoil=lambda update: {**update, "extra": np.zeros(1, np.float32)})
    fleet.settle(until=lambda: wrong.refusals != [])
    assert "device 0 was refused" in of(said, "warning")[-1]["text"]
    wrong.spoil = lambda update: update
    wrong.restart()
    fleet.finish()
    assert fleet.now < 30


def test_a_complaint_is_told_once_in_each_round(world, said):
    fleet = world("rounds.quorum=0.5")
    fleet.start()
    fleet.join("good")
    device = fleet.join("odd")
    for round in (1, 2):
        fleet.settle(until=lambda round=round: fleet.course.state.round == round and fleet.course.state.phase == "training")
        for _ in range(3):
            device.transport.publish(fleet.server._topics.from_device("odd", "beat"), b"{}")
    fleet.finish()
    assert len(of(said, "warning")) == 2


def test_a_finished_run_that_is_served_again_says_nothing_of_devices_that_left_long_ago(world, said):
    fleet = undisturbed(world)
    fleet.finish()
    for device in fleet.devices:
        fleet.broker.cut(device.name, reconnect=False)
    fleet.devices.clear()
    fleet.kill()
    said.clear()
    fleet.start()
    fleet.quiet()
    assert of(said, "device") == []


def test_a_run_that_goes_on_says_which_of_its_devices_is_lost(world, said):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    fleet.kill()
    fleet.broker.cut("b", reconnect=False)
    del fleet.devices[1]
    said.clear()
    fleet.start()
    fleet.quiet()
    assert of(said, "device", participant=1, status="not seen again yet") != []


@pytest.mark.parametrize(
    ("images", "source", "says"),
    [
        (10, "folder", "100 MB, 10 images)"),
        (1797, "digits", "100 MB, 1797 images of digits before the split)"),
        (0, "cifar10", "100 MB, images of cifar10)"),
    ],
)
def test_the_images_of_a_set_that_is_split_are_not_said_to_be_the_device_s(world, said, images, source, says):
    fleet = world()
    fleet.start()
    device = fleet.bring("a")
    device.tell("hello", HELLO.model_copy(update={"images": images, "source": source}))
    fleet.quiet()
    assert of(said, "device", status="joined")[0]["text"].endswith(says)


def test_a_chunk_that_was_damaged_on_the_way_is_said_once(world, said):
    fleet = world()
    fleet.start()
    fleet.join("good")
    device = fleet.join("garbled")
    garbled = []

    def interfere(client, topic, payload):
        if "/w0/" in topic and "/garbled/" in topic and len(garbled) < 3:
            garbled.append(topic)
            device.transport.publish(topic, b"junk")
            return 0
        return 1

    fleet.broker.interfere = interfere
    fleet.finish()
    (warning,) = of(said, "warning")
    assert "device garbled sent a chunk that does not fit its digest; it is asked for again" in warning["text"]


def test_a_device_that_falls_silent_is_said_to_be_lost(world, said):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    fleet.broker.cut("b", reconnect=False)
    fleet.quiet()
    assert of(said, "device", participant=1, status="is lost; it may return") != []


@pytest.mark.parametrize("restarted", [False, True])
def test_a_last_will_after_the_goodbye_does_not_bring_a_device_back(world, said, restarted):
    fleet = world()
    fleet.start()
    leaver = fleet.join("leaver")
    leaver.tell("state", leaver.state("stopped"), retain=True)
    fleet.quiet()
    if restarted:
        fleet.kill()
    leaver.tell("state", leaver.state("lost"), retain=True)
    leaver.transport.close()
    fleet.devices.clear()
    if restarted:
        fleet.start()
    fleet.quiet()
    assert fleet.course.state.devices == {0: "gone"}
    assert of(said, "device")[-1]["status"] == "has left"


def test_a_task_is_repeated_until_it_is_begun(world):
    fleet = world("rounds.min_devices=1")
    fleet.start()
    lost = []
    fleet.broker.interfere = lambda client, topic, payload: 0 if topic.endswith("dn/task") and not lost.append(topic) else 1
    device = fleet.join("deaf")
    fleet.settle(until=lambda: len(lost) == 3)
    assert 30 <= fleet.now < 31
    assert device.tasks == []
    fleet.broker.interfere = None
    fleet.finish()


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


def test_a_broker_that_dies_is_started_again_and_the_run_goes_on(world, said):
    fleet = world()
    fleet.start(revive=lambda: fleet.broker.start() or True)
    for name in ("a", "b"):
        fleet.join(name)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    fleet.broker.stop()
    fleet.finish()
    assert "started again" in of(said, "warning")[0]["text"]


def test_a_broker_that_refuses_us_ends_the_server_before_it_begins(world, said):
    fleet = world()
    fleet.start()
    with pytest.raises(Refused, match="bad password"):
        fleet.server.handle(Disconnected(Refused("bad password")))
    assert fleet.jobs == []
    assert said == []


def test_the_reason_why_no_broker_was_reached_is_told(world, said):
    fleet = world()
    fleet.broker.stop()
    fleet.start()
    for _ in range(2):
        fleet.server.handle(Disconnected(PortInUse("is the port right?")))
    assert [one["text"].split(maxsplit=1)[1] for one in said] == ["no connection, trying for 15 s: is the port right?"]
    assert fleet.server.next_wakeup(fleet.now) == 15.0
    fleet.now = 15.0
    with pytest.raises(PortInUse, match=r"no connection within 15 s: is the port right\?"):
        fleet.server.handle(None)
    assert fleet.jobs == []


def test_nothing_is_prepared_nor_anybody_called_before_the_broker_is_there(world, said):
    fleet = world()
    fleet.broker.stop()
    fleet.start()
    fleet.quiet()
    fleet.server.handle(Disconnected(Unreachable("is it running?")))
    assert fleet.jobs == []
    assert of(said, "waiting") == []
    fleet.now = 5.0
    fleet.broker.start()
    fleet.quiet()
    assert of(said, "doing")[0]["text"].endswith("connected")
    assert fleet.jobs == ["prepare", "evaluate"]
    assert "edge-agent join" in of(said, "waiting")[-1]["text"]


def test_blobs_are_cut_for_what_the_broker_takes(world, monkeypatch):
    monkeypatch.setattr(MemoryTransport, "packet_limit", 20_000)
    fleet = world("transfer.chunk_bytes=122880", "ssl.hidden_dim=512", "rounds.min_devices=1")
    fleet.start()
    fleet.join("a")
    fleet.finish()
    manifests = [messages.decode(messages.Manifest, payload) for _, topic, payload in fleet.broker.log if topic.endswith("dn/manifest")]
    assert {manifest.chunk_bytes for manifest in manifests} == {20_000 - 512}
    assert max(len(manifest.digests) for manifest in manifests) > 1


@pytest.mark.parametrize("limit", [512, 1400, 8000])
def test_a_broker_that_takes_too_small_packets_is_found_before_anybody_trains(world, monkeypatch, limit):
    monkeypatch.setattr(MemoryTransport, "packet_limit", limit)
    fleet = world()
    fleet.start()
    for _ in range(2):  # a second start is no way around it
        with pytest.raises(ConfigError, match=rf"takes packets of {limit} bytes at most.* raise its limit .* to \d+"):
            fleet.quiet()
        assert fleet.course.state.phase == "preparing"
        fleet.kill()
        fleet.start()
