from functools import partial

import pytest

from lwfed.edge_agent.events import EndWorker, StartWorker, Train, WorkerError, WorkerProgress, WorkerWarning
from lwfed.wire.messages import Fail, Offer
from lwfed.wire.upload import contribution_id

from .conftest import state


def test_a_worker_that_was_starting_for_a_round_that_closed_is_ended(world):
    server, device = world.joined()
    server.announce()
    server.assign(device.id)
    world.settle(2)
    assert device.worker == [StartWorker(1)]
    server.announce("aggregating")
    world.settle(0.2)
    assert device.worker[1:] == [EndWorker()]


@pytest.mark.parametrize("phase", ["called", "fetching"])
def test_the_death_of_an_idle_worker_does_not_fail_the_next_task(world, phase):
    server, device = world.training()
    device.finish()
    world.settle(2)
    server.broadcast.need = lambda *_: None  # no model arrives
    server.assign(device.id, round=2)
    server.announce("waiting" if phase == "called" else "training", round=2, content=b"newer" * 1000)
    world.settle(0.5)
    device.queue.append(WorkerError("out of memory", "ended by SIGKILL"))
    world.settle(0.5)
    assert not server.of(Fail)
    assert device.journal.task.round == 2
    del server.broadcast.need
    server.announce(round=2)
    world.settle(10)
    assert device.worker[-1] == StartWorker(1)


@pytest.mark.parametrize(
    ("kind", "message", "code"),
    [
        ("DataError", "3 images", "data"),
        ("Diverged", "nan", "diverged"),
        ("OutOfMemory", "no memory", "memory"),
        ("out of memory", "ended by SIGKILL", "memory"),
        ("Unfit", "stage 1 takes 900 MB more", "unfit"),
        ("crashed", "ended by SIGILL", "worker"),
        ("exit", "ended with exit code 1: out of memory, says somebody", "worker"),
        ("InvalidPayload", "wrong shape", "worker"),
    ],
)
def test_a_failure_is_reported_and_tried_again_when_the_server_says_so(world, kind, message, code):
    server, device = world.training()
    device.queue.append(WorkerError(kind, message))
    world.settle()
    assert [fail.code for fail in server.of(Fail)] == [code]
    assert message in device.texts("warning")[-1]
    assert (device.exit, state(world).state) == (None, "ready")
    server.assign(device.id)
    world.settle(2)
    assert device.worker[-1] == StartWorker(1)


def test_failures_in_a_round_are_numbered_also_by_an_agent_that_was_started_again(world):
    server, device = world.training()
    device.queue.append(WorkerError("OutOfMemory", "no memory"))
    world.settle()
    device.kill()
    again = world.start_device()
    world.settle()
    for round in (1, 2):
        server.announce(round=round)
        server.assign(again.id, round=round)
        world.settle(2)
        again.ready()
        world.settle(0.2)
        again.queue.append(WorkerError("Diverged", "nan"))
        world.settle()
    assert [(fail.round, fail.code, fail.attempt) for fail in server.of(Fail)] == [(1, "memory", 1), (1, "diverged", 2), (2, "diverged", 1)]


@pytest.mark.parametrize(
    ("kind", "onnxruntime", "left_out"),
    [("crashed", "1.20", True), ("crashed", None, False), ("exit", "1.20", False), ("out of memory", "1.20", False)],
)
def test_after_a_crash_with_graphs_torch_does_it_all_until_the_agent_is_restarted(world, kind, onnxruntime, left_out):
    server, device = world.joined()
    graphs = {"onnx": server.store.put(b"graph")}
    orders = []
    for round in (1, 2, 3):
        server.announce(stage=2, round=round, graphs=graphs)
        server.assign(device.id, stage=2, round=round)
        world.settle(2)
        device.ready(onnxruntime=onnxruntime)
        world.settle(0.2)
        orders.append(device.worker[-1].order)
        device.queue.append(WorkerError(kind, "ended by a signal"))
        world.settle()
    assert [set(order["graphs"]) for order in orders] == [{"onnx"}, *[set() if left_out else {"onnx"}] * 2]
    said = [text for text in device.texts("warning") if text.startswith("ONNX Runtime may be the cause")]
    assert len(said) == left_out
    device.kill()
    device = world.start_device()
    world.settle(0.2)
    server.announce(stage=2, round=4, graphs=graphs)
    server.assign(device.id, stage=2, round=4)
    world.settle(2)
    device.ready()
    world.settle(0.2)
    assert set(device.worker[-1].order["graphs"]) == {"onnx"}


def test_a_task_whose_training_process_was_killed_begins_again_as_it_was_and_nobody_hears_of_it(world):
    server, device = world.training()
    for _ in range(3):
        device.queue.append(WorkerError("killed", "the training process ended by SIGKILL"))
        world.settle()
        assert device.worker[-1] == StartWorker(1)
        device.ready()
        world.settle(0.2)
    first, *repeated = [effect.order for effect in device.worker if isinstance(effect, Train)]
    assert repeated == [{**first, "execution": {"prefix": "torch", "micro_batch": 16}}] * 3
    assert device.texts("warning") == ["the training process ended by SIGKILL; stage 1, round 1 begins again"] * 3
    assert not server.of(Fail)
    device.finish()
    world.settle(2)
    assert server.of(Offer)[0].report.execution.micro_batch == 16


def test_kills_in_one_task_are_not_held_against_the_next(world):
    server, device = world.training()
    for round in (1, 2):
        for _ in range(3):
            device.queue.append(WorkerError("killed", "the training process ended by SIGKILL"))
            world.settle()
            device.ready()
            world.settle(0.2)
        device.finish()
        world.settle(2)
        if round == 1:
            server.announce(round=2)
            server.assign(device.id, round=2)
            world.settle(2)
    assert [offer.round for offer in server.of(Offer)] == [1, 2]
    assert not server.of(Fail)


def test_losses_of_a_training_that_was_killed_are_not_those_of_the_one_that_begins_again(world):
    _, device = world.training()
    progress = partial(WorkerProgress, epoch=1, epochs=1, steps=2, rss_mb=100.0)
    device.queue.append(progress(step=1, loss=9.0))
    device.queue.append(WorkerError("killed", "the training process ended by SIGKILL"))
    world.settle()
    device.ready()
    world.settle(0.2)
    device.queue += [progress(step=1, loss=3.0), progress(step=2, loss=1.0)]
    world.settle()
    assert device.texts("training") == ["epoch 1 of 1: loss 2.0000, memory 100 MB"]


def test_a_training_process_that_is_killed_while_it_starts_is_started_again(world):
    server, device = world.joined()
    server.announce()
    server.assign(device.id)
    world.settle(2)
    device.queue.append(WorkerError("killed", "the training process ended by SIGKILL"))
    world.settle()
    assert device.worker == [StartWorker(1)] * 2
    device.ready()
    world.settle(0.2)
    assert device.worker[-1].order["execution"] is None
    assert not server.of(Fail)


@pytest.mark.parametrize("code", ["stale", "not_chosen"])
def test_a_refused_update_is_dropped_and_said(world, code):
    server, device = world.training()
    server.refusal = code
    device.finish()
    world.settle(2)
    assert device.journal.update is None
    assert code in device.texts("refused")[0]
    assert state(world).state == "ready"


def test_an_update_survives_the_death_of_the_agent(world):
    server, device = world.training()
    server.answers = False
    device.finish(b"precious" * 100)
    world.settle(2)
    device.kill()
    server.answers = True
    again = world.start_device()
    world.settle(2)
    assert server.received == [b"precious" * 100]
    assert again.journal.boot == 2
    assert again.id == device.id
    assert not again.worker


def test_an_interrupted_task_begins_again_when_the_server_sends_it(world):
    server, device = world.training()
    device.kill()
    again = world.start_device()
    world.settle(1)
    assert "interrupted" in again.texts("warning")[0]
    server.assign(again.id)
    world.settle(2)
    again.ready()
    world.settle(0.2)
    assert isinstance(again.worker[-1], Train)
    assert again.texts("warning")[1:] == []


def test_an_update_is_handed_over_after_an_outage_of_the_server(world):
    server, device = world.training()
    world.kill_server()
    device.finish(b"late" * 100)
    world.settle(30)
    assert not server.received
    again = world.start_server(epoch=2)
    world.settle(2)
    assert again.received == [b"late" * 100]


def test_an_update_for_an_older_round_gives_way_to_a_new_task(world):
    server, device = world.training()
    server.answers = False
    device.finish()
    world.settle(1)
    assert device.journal.update.task.round == 1
    server.announce(round=2)
    server.assign(device.id, round=2)
    world.settle(0.1)
    assert device.journal.task.round == 2
    server.answers, server.refusal = True, "stale"
    world.settle(10)
    assert not server.received
    assert device.journal.update is None
    assert [order["round"] for order in orders(device)] == [1, 2]


def orders(device):
    return [effect.order for effect in device.worker if isinstance(effect, Train)]


def test_what_a_round_builds_upon_is_the_last_update_that_was_taken(world):
    """Here of round 2, for that of round 3 is refused; the same again where round 4 is done twice, and another process does it."""
    server, device = world.training()
    for round, refusal in ((1, None), (2, None), (3, "not_chosen"), (4, "content")):
        server.refusal = refusal
        server.announce(round=round)
        server.assign(device.id, round=round)
        world.settle(2)
        device.finish(b"%d" % round * 500)
        world.settle(2)
    assert [order["after"] for order in orders(device)] == [None, 1, 2, 2]
    device.kill()
    again = world.start_device()
    world.settle(1)
    server.assign(again.id, round=4)
    world.settle(2)
    again.ready()
    world.settle(0.2)
    assert [order["after"] for order in orders(again)] == [2]


def test_a_round_that_a_restarted_server_has_forgotten_is_repeated_as_it_was(world):
    server, device = world.training()
    device.finish(b"one")
    world.settle(2)
    for epoch in (1, 2):
        server.announce(round=2)
        server.assign(device.id, round=2)
        world.settle(2)
        device.finish(b"two")
        world.settle(2)
        world.kill_server()
        server = world.start_server(epoch=epoch + 1)
        world.settle(1)
    assert [order["after"] for order in orders(device)] == [None, 1, 1]


def test_an_update_that_was_taken_is_built_upon_although_nobody_heard_it(world):
    """The server's word was lost, and the next round has begun: its training waits until the server has said it again."""
    server, device = world.training()
    server.answers = False
    device.finish()
    world.settle(1)
    server.known.add(contribution_id("demo", 1, 1, device.id, device.journal.update.blob.id))
    server.announce(round=2)
    server.assign(device.id, round=2)
    world.settle(20)
    assert len(orders(device)) == 1
    server.answers = True
    world.settle(35)  # it asks later and later; its worker lingers for 60 s
    assert [(order["round"], order["after"]) for order in orders(device)] == [(1, None), (2, 1)]


@pytest.mark.parametrize("round", [1, 2])
def test_another_run_of_the_same_name_does_not_build_upon_what_the_first_one_took(world, round):
    server, device = world.training()
    for number in (1, 2, 3):
        server.announce(round=number)
        server.assign(device.id, round=number)
        world.settle(2)
        device.finish(b"%d" % number * 500)
        world.settle(2)
    world.kill_server()
    anew = world.start_server(epoch=2)
    anew.announce(round=round)
    world.settle(1)
    anew.announce(round=4)
    anew.assign(device.id, round=4)
    world.settle(2)
    assert [order["after"] for order in orders(device)] == [None, 1, 2, None]


def test_what_the_training_process_warns_of_is_said_and_ends_nothing(world):
    server, device = world.training()
    device.queue.append(WorkerWarning("residual-1.safetensors cannot be read"))
    device.finish()
    world.settle(2)
    assert device.texts("warning") == ["residual-1.safetensors cannot be read"]
    assert server.received
