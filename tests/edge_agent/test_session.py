import pytest

from lwfed.edge_agent.events import EndWorker, StartWorker, Stop, Train, WorkerError
from lwfed.errors import ProtocolMismatch, Refused, Unreachable
from lwfed.transport.base import Disconnected
from lwfed.wire import messages
from lwfed.wire.messages import Fail, Fin, Hello, Offer, State
from lwfed.wire.topics import Topics

TOPICS = Topics("default")


def state(world):
    return messages.decode(State, world.broker.retained[TOPICS.from_device(world.device.id, "state")])


# Joining


def test_it_greets_the_server_and_says_that_it_is_ready(world):
    server, device = world.joined()
    assert server.greeted == [device.id]
    assert server.of(Hello)[0].boot == 1
    assert (state(world).state, state(world).boot) == ("ready", 1)


def test_it_waits_for_a_server_and_says_so_once(world):
    device = world.start_device()
    world.settle(20)
    assert len(device.texts("server")) == 1
    world.start_server()
    world.settle()
    assert world.server.greeted == [device.id]


def test_it_greets_again_after_a_reconnection_and_after_a_restart_of_the_server(world):
    server, device = world.joined()
    world.broker.cut(device.id)
    world.settle()
    assert server.greeted == [device.id] * 2
    world.kill_server()
    world.settle()
    assert device.texts("server")[-1] == "the server is offline; waiting for it"
    again = world.start_server(epoch=2)
    world.settle()
    assert again.greeted == [device.id]


def test_no_first_connection_within_the_wait_ends_with_the_reason(world):
    world.broker.stop()
    device = world.start_device(wait_s=15)
    device.queue.append(Disconnected(Unreachable("nobody at broker:1883")))
    world.settle(14)
    assert device.exit is None
    world.settle(2)
    assert isinstance(device.exit.error, Unreachable)
    assert "broker:1883" in str(device.exit.error)


def test_refused_credentials_end_it_at_once_but_only_before_the_first_success(world):
    device = world.start_device()
    world.settle(0.2)
    device.queue.append(Disconnected(Refused("wrong password")))
    world.settle(60)
    assert device.exit is None
    world.broker.stop()
    other = world.start_device()
    other.queue.append(Disconnected(Refused("wrong password")))
    world.settle(0.1)
    assert isinstance(other.exit.error, Refused)


def test_an_outage_is_said_once_and_outlasted(world):
    _, device = world.joined()
    world.broker.stop()
    for _ in range(3):
        device.queue.append(Disconnected(Unreachable("still down")))
        world.settle()
    assert len(device.texts("disconnected")) == 1
    world.broker.start()
    world.settle()
    assert device.texts("joined")[-1] == "connected again"


def test_a_server_of_another_protocol_ends_it_with_advice(world):
    device = world.start_device()
    world.server = None
    payload = b'{"v": 9, "online": true, "epoch": 1, "protocol_min": 8, "protocol_max": 9, "new": 1}'
    link = world.broker.transport()
    link.open("newer", None, lambda event: None)
    link.publish(TOPICS.server_state, payload, retain=True)
    world.settle(0.2)
    assert isinstance(device.exit.error, ProtocolMismatch)
    assert "upgrade" in str(device.exit.error)


def test_stop_ends_agent_and_worker(world):
    _, device = world.training()
    device.queue.append(Stop())
    world.settle(0.1)
    assert device.exit.error is None
    assert device.worker[-1] == EndWorker()


def test_what_does_not_parse_is_ignored_and_said_without_filling_the_log(world):
    server, device = world.joined()
    for _ in range(10):
        server.link.publish(TOPICS.run, b"{")
        server.link.publish(TOPICS.to_device(device.id, "task"), b'{"run": 3}')
    world.settle()
    assert device.exit is None
    assert len(device.texts("warning")) == 5


# A round


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


def test_a_second_round_of_a_stage_uses_the_same_worker_and_fetches_only_what_changed(world):
    server, device = world.training()
    device.finish()
    world.settle(2)
    before, chunks = len(device.worker), server.broadcast.sent_chunks
    parts = {part: server.store.put(part.encode() + b"weights" * 1000) for part in ("stem", "norm", "projector", "predictor")}
    server.announce(round=2, parts={**parts, "layer.1": server.store.put(b"changed" * 1000)})
    server.assign(device.id, round=2)
    world.settle(2)
    assert [type(effect) for effect in device.worker[before:]] == [Train]
    assert server.broadcast.sent_chunks - chunks == 7


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


def test_a_finished_run_is_said_once_and_the_device_stays(world):
    server, device = world.joined()
    for _ in range(3):
        server.announce("finished")
        world.settle(0.2)
    assert device.texts("run") == ["run demo is finished; waiting for another"]
    assert device.exit is None


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


# What goes wrong


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
    server.broadcast.need = lambda *_: []  # no model arrives
    server.assign(device.id, round=2)
    if phase == "fetching":
        server.announce(round=2, content=b"newer" * 1000)
    world.settle(0.5)
    device.queue.append(WorkerError("died", "ended by SIGKILL: out of memory"))
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
        ("died", "ended by SIGKILL: probably killed because the device ran out of memory", "memory"),
        ("died", "ended by SIGILL", "worker"),
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


def test_a_configuration_of_a_newer_server_fails_the_task_not_the_agent(world):
    server, device = world.joined()
    server.config = server.store.put(b'{"run": {}}')
    server.announce()
    server.assign(device.id)
    world.settle(2)
    assert [fail.code for fail in server.of(Fail)] == ["config"]
    assert device.exit is None


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


def test_a_repetition_under_another_torch_is_said(world):
    server, device = world.training()
    device.kill()
    again = world.start_device()
    world.settle()
    server.assign(again.id)
    world.settle(2)
    again.ready(torch="2.10")
    world.settle(0.2)
    assert "torch 2.9" in again.texts("warning")[-1]
    assert again.journal.execution("demo", 1).torch == "2.10"


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
    assert device.journal.update is None
    assert "comes too late" in device.texts("refused")[0]
    assert device.journal.task.round == 2
    server.answers = True
    world.settle(2)
    assert not server.received


# Replays


def test_an_older_announcement_is_ignored(world):
    server, device = world.joined()
    server.announce(stage=2, seq=7)
    world.settle(0.2)
    server.announce(stage=1, seq=3)
    server.assign(device.id, stage=1)
    server.assign(device.id, stage=2)
    world.settle(2)
    assert device.texts("task") == ["stage 2, round 1: this device trains"]


def test_the_retained_announcement_is_obeyed_again_after_a_restart_of_the_agent(world):
    server, device = world.joined()
    server.announce()
    world.settle(0.2)
    device.kill()
    again = world.start_device()
    world.settle(0.2)
    server.assign(again.id)
    world.settle(2)
    assert again.worker == [StartWorker(1)]


def test_a_server_that_lost_its_state_is_followed(world):
    server, device = world.joined()
    server.epoch = 5
    server.link.publish(TOPICS.server_state, server.state(), retain=True)
    server.announce()
    world.settle(0.2)
    world.kill_server()
    fresh = world.start_server(epoch=1)
    fresh.announce()
    fresh.assign(device.id)
    world.settle(2)
    assert device.worker == [StartWorker(1)]


def test_the_late_will_of_an_older_server_is_ignored(world):
    server, device = world.joined()
    server.epoch = 2
    server.link.publish(TOPICS.server_state, server.state(), retain=True)
    world.settle(0.2)
    server.epoch = 1
    server.link.publish(TOPICS.server_state, server.state(online=False))
    world.settle(0.2)
    assert "offline" not in device.texts("server")[-1]


def test_an_idle_device_is_silent(world):
    world.joined()
    world.settle(1)
    before = len(world.broker.log)
    world.settle(600)
    assert len(world.broker.log) == before
