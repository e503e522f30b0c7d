"""What floods of small messages may cost everybody else, and that devices without malice are never limited."""

import pytest

from lwfed.cloud_server import limits, news, reception
from lwfed.cloud_server.limits import MESSAGES_AT_ONCE, MESSAGES_PER_S, Buckets, Door
from lwfed.wire import messages
from lwfed.wire.messages import State, encode
from lwfed.wire.topics import Topics

from .fleets import HELLO, counted, of, start, undisturbed

TOPICS = Topics("default")


def test_a_bucket_gives_what_it_holds_and_then_what_comes_back(monkeypatch):
    buckets = Buckets(per_s=4, at_once=8)
    assert [buckets.take("a", 100) for _ in range(9)] == [True] * 8 + [False]
    assert buckets.take("b", 100)
    assert [buckets.take("a", 100.5) for _ in range(3)] == [True, True, False]
    assert [buckets.take("a", 999) for _ in range(9)] == [True] * 8 + [False]
    monkeypatch.setattr(limits, "MAX_KEYS", 2)
    assert buckets.take("c", 999)  # b, which has all its tokens again, is forgotten for it
    assert not buckets.take("a", 999)


@pytest.mark.parametrize(
    ("topic", "limited"),
    [
        (TOPICS.from_device("a", "hello"), True),
        (TOPICS.from_device("a", "nonsense"), True),
        ("lwfed/default/d/a/up/x/y", True),
        (TOPICS.from_token("0123"), True),
        (TOPICS.update_chunk("a", "w0", "c", 7), False),
        (TOPICS.server_state, False),
    ],
)
def test_the_door_limits_messages_and_no_chunks(topic, limited):
    door = Door(TOPICS, lambda: 0.0)
    assert [door.admits(topic) for _ in range(MESSAGES_AT_ONCE)] == [True] * MESSAGES_AT_ONCE
    assert door.admits(topic) is not limited
    assert list(door.excess().values()) == ([1] if limited else [])
    assert not door.excess()


def noted(work, calls):
    return lambda *given: (calls.append(given), work(*given))[1]


def test_a_flood_of_greetings_is_neither_queued_nor_written(world, said, monkeypatch):
    fleet = undisturbed(world)
    evil, other = fleet.devices
    written = []
    store = fleet.course.store
    for name in ("admit", "note_double"):
        monkeypatch.setattr(store, name, noted(getattr(store, name), written))
    for boot in range(2, 3002):
        evil.tell("hello", HELLO.model_copy(update={"start": start(boot if boot % 2 else 1)}))
    fleet.broker.pump()
    other.tell("hello", HELLO)
    fleet.broker.pump()
    assert fleet.server._queue.qsize() <= MESSAGES_AT_ONCE + 1
    fleet.quiet()
    assert len(written) <= reception.STARTS_AT_ONCE + 3  # the other one, and that each of them is two
    texts = [one["text"] for one in of(said, "warning", device="a")]
    assert sum("a sends more than 20 messages a second" in text for text in texts) == 1
    assert len(texts) == len({one["code"] for one in of(said, "warning", device="a")})
    found = counted(fleet)["a"]
    assert found["flood"] >= 3000 - MESSAGES_AT_ONCE
    assert found["starts"] > 0


def test_a_device_that_comes_and_goes_does_not_fill_the_log(world, said):
    fleet = undisturbed(world, "rounds.min_devices=3")
    said.clear()
    for number in range(1200):
        fleet.devices[0].tell("state", State(state="ready" if number % 2 else "lost", start=fleet.devices[0].start))
        fleet.now += 1 / MESSAGES_PER_S
        fleet.quiet()
    assert fleet.now > 59
    assert len(said) <= 3 * (news.AGAIN_AT_ONCE + 1) + 1  # its lines, those of one and of two that are here, and the complaint
    assert len(of(said, "warning", code="presence")) == 1
    assert fleet.course.state.here == [0, 1]
    assert counted(fleet)["a"].keys() == {"presence"}


def test_beats_are_passed_on_to_programs_a_few_times_a_minute(world, said):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    place = {"run": fleet.course.run_id, "stage": 1, "round": 1}
    beat = messages.Beat(**place, epoch=1, epochs=2, step=3, steps=4, loss=1.0, rss_mb=300)
    for _ in range(100):
        fleet.devices[0].tell("beat", beat)
    fleet.quiet()
    assert len(of(said, "progress")) == news.BEATS_AT_ONCE


def test_a_device_that_fails_and_starts_again_and_again_is_told_of_once_in_a_round(world, said):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    for device in fleet.devices:
        device.poll = lambda now: None
    for boot in range(2, 60):
        fail = messages.Fail(run=fleet.course.run_id, stage=1, round=1, code="memory", reason=f"out of memory, {boot}")
        fleet.devices[0].tell("fail", fail)
        fleet.devices[0].tell("state", State(state="ready", start=start(boot)))
    fleet.quiet()
    assert len(of(said, "warning", code="memory")) == 1
    assert counted(fleet)["a"]["memory"] <= reception.STARTS_AT_ONCE + 2  # once more after the last start that is believed


@pytest.mark.parametrize("devices", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_devices_that_come_back_at_once_are_all_heard(world, said, devices):
    fleet = world(f"rounds.min_devices={devices + 1}")
    fleet.start()
    need = messages.Need(blobs=tuple(messages.Want(id=f"{number:064x}", missing=None) for number in range(12)))
    gone, back = (("state", State(state=state, start=HELLO.start)) for state in ("lost", "ready"))
    device = fleet.broker.transport()
    device.open("all", None, lambda event: None)
    for kind, message in (("hello", HELLO), gone, back, ("hello", HELLO), *[("need", need)] * 10):  # repeated while the server was held up
        for number in range(devices):
            device.publish(TOPICS.from_device(f"d-{number}", kind), encode(message))
    fleet.broker.pump()
    assert fleet.server._queue.qsize() >= 14 * devices
    fleet.quiet()
    assert len(fleet.course.state.here) == devices
    assert of(said, "warning") == []
    assert not any(counted(fleet).values())


def test_a_device_that_catches_up_on_twelve_parts_is_not_limited(world, said):
    fleet = world("model.depth=11", "stages.strategy=end_to_end", "rounds.quorum=0.5")
    fleet.start()
    fleet.join("a")
    fleet.join("b")
    fleet.settle(until=lambda: fleet.course.state.round == 2)
    late = fleet.join("late")
    for _ in range(5):
        fleet.broker.cut("late")
        fleet.quiet()
    fleet.settle(until=lambda: late.sent == 2)
    assert len(late.run.parts) >= 12
    assert late.tasks
    assert of(said, "warning") == []
    assert not any(found.keys() & {"flood", "starts"} for found in counted(fleet).values())
