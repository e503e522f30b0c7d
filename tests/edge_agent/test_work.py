import pytest

from lwfed.blobs import PartFile
from lwfed.edge_agent.events import EndWorker, StartWorker, Train, WorkerError
from lwfed.wire.messages import Fail, Fin, Offer, State

from .conftest import part_file, state


def test_a_round_from_task_to_acknowledgement(world):
    server, device = world.training()
    assert state(world).state == "training"
    order = device.worker[-1].order
    assert set(order["parts"]) == {"stem", "layer.1", "norm", "projector", "predictor"}
    assert device.worker == [StartWorker(1), Train(order, 0.5)]
    device.finish(b"the update" * 500)
    world.settle(2)
    assert server.received == [b"the update" * 500]
    offer = server.of(Offer)[0]
    assert (offer.report.images, offer.report.execution.torch, offer.participant) == (9, "2.9", 0)
    traffic = server.of(Fin)[-1].traffic
    assert traffic.down > 35_000
    assert traffic.up > 5_000
    assert device.journal.update is None
    assert state(world).state == "ready"
    assert device.texts("accepted") == ["the server has the update of stage 1, round 1"]
    assert "over 9 images (1 unreadable)" in device.texts("update")[0]


@pytest.mark.parametrize("first", ["task", "announcement"])
def test_task_and_announcement_come_in_any_order(world, first):
    server, device = world.joined()
    steps = [lambda: server.assign(device.id), server.announce]
    for step in steps if first == "task" else reversed(steps):
        step()
        world.settle(1)
    world.settle(2)
    assert device.worker == [StartWorker(1)]


def test_a_device_with_fewer_images_than_a_batch_says_so_once(world):
    server, device = world.training()
    for round in (1, 2):
        device.finish()
        world.settle(2)
        server.announce(round=round + 1)
        server.assign(device.id, round=round + 1)
        world.settle(2)
    assert device.texts("images") == ["9 images are fewer than train.batch_size 32: this device trains on batches of 9"]


def test_where_images_lie_is_told_here_and_not_to_the_server(world):
    server, device = world.start_server(), world.start_device(data="/home/ann/photos")
    server.announce()
    server.assign(device.id)
    world.settle(2)
    device.ready()
    device.queue.append(WorkerError("DataError", "3 readable images in '/home/ann/photos'"))
    world.settle()
    (fail,) = server.of(Fail)
    assert (fail.code, fail.reason) == ("data", "3 readable images in 'folder'")
    assert "'/home/ann/photos'; this device stays connected" in device.texts("warning")[0]


@pytest.mark.parametrize("stray", [{"run": "other"}, {"round": 3}, {"stage": 4}])
def test_a_task_that_is_not_announced_costs_the_present_one_nothing(world, stray):
    server, device = world.training()
    before = list(device.worker)
    for _ in range(3):
        server.assign(device.id, **stray)
    world.settle()
    assert device.worker == before
    assert device.texts("task") == ["stage 1, round 1: this device trains"]
    assert len(device.texts("warning")) == 1
    assert "the server announces run demo, stage 1, round 1" in device.texts("warning")[0]
    device.finish()
    world.settle(2)
    assert server.received
    assert state(world).state == "ready"


def test_a_task_that_is_not_announced_keeps_no_device_busy(world):
    server, device = world.joined()
    server.announce(phase="waiting")
    server.assign(device.id, run="other")
    world.settle()
    assert state(world).state == "ready"
    assert device.journal.task is None
    server.announce(run="other")
    world.settle(2)
    assert device.texts("task") == ["stage 1, round 1: this device trains"]
    assert device.worker == [StartWorker(1)]


def test_a_task_that_is_not_announced_costs_a_finished_update_nothing(world):
    server, device = world.training()
    server.answers = False
    device.finish()
    world.settle()
    server.assign(device.id, run="other")
    world.settle()
    server.answers = True
    world.settle(10)
    assert server.received


def test_damaged_chunks_of_the_model_are_said(world, monkeypatch):
    server, device = world.joined()
    write, damaged = PartFile.write, iter([True, True])
    monkeypatch.setattr(PartFile, "write", lambda part, index, data: write(part, index, b"junk" if next(damaged, False) else data))
    server.announce()
    server.assign(device.id)
    world.settle(5)
    assert [text.partition("; ")[2] for text in device.texts("download")] == ["2 damaged chunks had to be sent again"]
    server.announce(round=2, content=b"newer" * 1000)
    server.assign(device.id, round=2)
    world.settle(5)
    assert "damaged" not in device.texts("download")[1]


def test_a_second_round_of_a_stage_uses_the_same_worker_and_fetches_only_what_changed(world):
    server, device = world.training()
    device.finish()
    world.settle(2)
    before, chunks = len(device.worker), server.broadcast.sent_chunks
    parts = {part: server.store.put(part_file(part)) for part in ("stem", "norm", "projector", "predictor")}
    server.announce(round=2, parts={**parts, "layer.1": server.store.put(part_file("layer.1", b"changed" * 1000))})
    server.assign(device.id, round=2)
    world.settle(2)
    assert [type(effect) for effect in device.worker[before:]] == [Train]
    assert server.broadcast.sent_chunks - chunks == 7


def test_graphs_come_with_the_parts_and_stay_until_another_run_has_none(world):
    server, device = world.joined()
    graphs = {engine: server.store.put(f"graph of {engine}".encode()) for engine in ("onnx", "onnx_int8")}
    files = {engine: device.root / "model" / ref.id for engine, ref in graphs.items()}
    for stage in (2, 3):
        server.announce(stage=stage, graphs=graphs)
        server.assign(device.id, stage=stage)
        world.settle(2)
        device.ready()
        world.settle(1)
        assert device.worker[-1].order["graphs"] == {engine: str(file) for engine, file in files.items()}
        assert files["onnx_int8"].read_bytes() == b"graph of onnx_int8"
        device.finish()
        world.settle(2)
    sent = [topic for _, topic, _ in world.broker.log if graphs["onnx"].id in topic]
    assert len(sent) == 1
    server.announce(run="another")
    server.assign(device.id, run="another")
    world.settle(2)
    device.ready()
    world.settle(1)
    assert device.worker[-1].order["graphs"] == {}
    assert not any(file.exists() for file in files.values())


def test_a_new_stage_gets_a_new_worker(world):
    server, device = world.training()
    device.finish()
    world.settle(2)
    server.announce(stage=2)
    world.settle(0.2)
    assert device.worker[-1] == EndWorker()
    server.assign(device.id, stage=2)
    world.settle(2)
    assert device.worker[-1] == StartWorker(1)


def test_an_idle_worker_is_ended_after_its_linger(world):
    _, device = world.training()
    device.finish()
    world.settle(58)
    assert isinstance(device.worker[-1], Train)
    world.settle(4)
    assert device.worker[-1] == EndWorker()


def test_a_newer_round_ends_the_old_training(world):
    server, device = world.training()
    server.announce(round=2, content=b"newer" * 1000)
    server.assign(device.id, round=2)
    world.settle(2)
    assert EndWorker() in device.worker
    assert device.worker[-1] == StartWorker(1)
    assert device.journal.task.round == 2


def test_a_round_that_closed_is_left_even_before_the_next_one(world):
    server, device = world.training()
    server.announce("aggregating")
    world.settle(0.2)
    assert device.worker[-1] == EndWorker()
    assert device.journal.task is None
    assert state(world).state == "ready"


def test_a_round_that_is_withdrawn_is_left_and_begun_anew_when_the_run_goes_on(world):
    server, device = world.training()
    server.announce("waiting", paused=True)
    world.settle(0.2)
    assert device.worker[-1] == EndWorker()
    assert state(world).state == "ready"
    assert device.texts("warning") == ["stage 1, round 1 is withdrawn until the run goes on"]
    server.assign(device.id)  # late
    world.settle(0.2)
    assert device.worker[-1] == EndWorker()
    server.announce()
    server.assign(device.id)
    world.settle(2)
    assert device.worker[-1] == StartWorker(1)
    said = device.texts("run")
    assert said[1:] == ["run demo is paused by its operator: no further round begins until it goes on", "run demo goes on"]


def test_a_pause_lets_the_present_round_be_trained_and_costs_hardly_any_bytes(world):
    server, device = world.training()
    server.announce(paused=True)
    world.settle(0.2)
    assert isinstance(device.worker[-1], Train)
    device.finish(b"the update")
    world.settle(2)
    assert server.received == [b"the update"]
    server.announce("waiting", round=2, paused=True)
    world.settle(0.2)
    world.broker.log.clear()
    world.settle(3600)
    greeting = f"lwfed/default/d/{device.id}/up/hello"  # which comes less and less often
    assert {topic for client, topic, _ in world.broker.log if client == device.id} == {greeting}


@pytest.mark.parametrize("phase", ["finished", "stopped"])
def test_a_run_that_is_over_is_said_once_and_the_device_stays(world, phase):
    server, device = world.training()
    for _ in range(3):
        server.announce(phase)
        world.settle(0.2)
    assert device.texts("run")[-1:] == [f"run demo is {phase}; waiting for another"]
    assert len(device.texts("run")) == 2
    assert device.worker[-1] == EndWorker()
    assert device.exit is None


def test_the_part_of_the_rate_that_is_left_goes_to_the_training(world):
    server, device = world.joined()
    server.announce(lr_scale=0.25)
    server.assign(device.id)
    world.settle(2)
    device.ready()
    world.settle(0.2)
    assert device.worker[-1].order["lr_scale"] == 0.25


def test_a_task_said_twice_is_done_once(world):
    server, device = world.training()
    server.assign(device.id)
    world.settle()
    device.finish()
    world.settle(2)
    server.announce("aggregating")
    server.assign(device.id)
    world.settle(2)
    assert len([effect for effect in device.worker if isinstance(effect, Train)]) == 1


def test_a_task_said_again_is_answered_where_it_is_worked_on_and_not_where_its_announcement_is_missing(world):
    """The server takes who is silent for lost; and says the announcement again to those who are."""
    server, device = world.joined()

    def states():
        return [one.state for one in server.of(State)]

    server.announce("waiting")
    server.assign(device.id)
    world.settle()
    before = states()
    server.assign(device.id)
    world.settle()
    assert states() == before
    server.announce()
    world.settle()
    device.ready()
    world.settle()
    before = states()
    server.assign(device.id)
    world.settle()
    assert states() == [*before, "training"]


def trainings(device):
    return len([effect for effect in device.worker if isinstance(effect, Train)])


@pytest.mark.parametrize("restarted", [False, True])
def test_a_task_said_again_after_its_update_was_accepted_is_not_done_again(world, restarted):
    server, device = world.training()
    device.finish()
    world.settle(2)
    assert server.received
    if restarted:
        device.kill()
        device = world.start_device()
        world.settle(1)
    server.assign(device.id)
    world.settle(2)
    assert not device.texts("task")[0 if restarted else 1 :]
    assert state(world).state == "ready"
    server.announce(round=2)
    server.assign(device.id, round=2)
    world.settle(2)
    assert device.journal.task.round == 2


def test_a_refused_update_is_made_again_when_the_server_asks(world):
    server, device = world.training()
    server.refusal = "content"
    device.finish()
    world.settle(2)
    server.assign(device.id)
    world.settle(2)
    assert trainings(device) == 2


def test_a_server_that_lost_an_accepted_update_gets_it_again(world):
    _, device = world.training()
    device.finish()
    world.settle(2)
    world.kill_server()
    again = world.start_server(epoch=2)
    again.announce()
    world.settle(1)
    again.assign(device.id)
    world.settle(2)
    assert trainings(device) == 2


def test_what_is_known_of_another_run_goes_when_a_run_is_followed(world):
    server, device = world.training()
    device.finish()
    world.settle(2)
    assert device.journal.execution("demo", 1)
    server.announce(run="next")
    world.settle(0.2)
    assert device.journal.execution("demo", 1) is None
    assert device.journal.traffic("demo").down == 0
