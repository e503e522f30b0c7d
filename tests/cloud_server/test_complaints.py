"""What the server has against devices is counted, summed up and kept."""

import pytest

from lwfed.cloud_server import complaints
from lwfed.cloud_server.overview import overview
from lwfed.wire import messages
from lwfed.wire.messages import encode
from lwfed.wire.topics import Topics

from .fleets import counted, of, undisturbed

TOPICS = Topics("default")


def test_what_is_dropped_is_counted_said_at_the_end_of_the_round_and_stays(world, said):
    fleet = undisturbed(world)
    device = fleet.devices[0]
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    for topic in ("lwfed/default/d/a/up/x/y", "lwfed/default/d/a/up/z"):
        device.transport.publish(topic, b"")
    for name in ("a", "stranger"):
        device.transport.publish(TOPICS.from_device(name, "fin"), encode(messages.Fin(contribution="c", traffic={"down": 0, "up": 0})))
        device.transport.publish(TOPICS.update_chunk(name, "w0", "c", 0), b"stray")
    fleet.quiet()
    assert [one["text"] for one in of(said, "warning")] == [of(said, "warning", code="topic")[0]["text"]]
    fleet.settle(until=lambda: fleet.course.state.round == 2)
    summary = of(said, "complaints")[0]
    assert summary["devices"] == {"a": {"topic": 2, "slot": 2}, "stranger": {"unknown": 2}}
    assert "round 1: complaints about a (slot 2, topic 2), stranger (unknown 2)" in summary["text"]
    fleet.kill()
    fleet.start()
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    device.transport.publish("lwfed/default/d/a/up/z", b"")
    fleet.finish()
    assert "complaints: slot 2, topic 3" in overview(fleet.root / "server")


def spoken(kind, run, **place):
    """A beat, or that a device failed, of a place in a run."""
    at = {"run": run, "stage": 1, "round": 1, **place}
    if kind == "beat":
        return messages.Beat(**at, epoch=1, epochs=2, step=3, steps=4, loss=1.0, rss_mb=300)
    return messages.Fail(**at, code="memory", reason="out of memory")


@pytest.mark.parametrize("kind", ["beat", "fail"])
def test_what_comes_late_accuses_nobody_and_what_never_was_is_counted(world, said, kind):
    fleet = undisturbed(world, "stages.rounds_per_stage=3")
    fleet.settle(until=lambda: fleet.course.state.round == 2 and fleet.course.state.phase == "training")
    counted(fleet)
    said.clear()
    device, other = fleet.devices
    for _ in range(2):
        device.tell(kind, spoken(kind, fleet.course.run_id))
    fleet.quiet()
    assert not any(counted(fleet).values())
    for place in ({"run": "another"}, {"round": 3}, {"stage": 2}, {"stage": 9, "round": 9}):
        device.tell(kind, spoken(kind, **{"run": fleet.course.run_id, **place}))
    other.tell(kind, spoken(kind, run="another"))
    fleet.quiet()
    assert counted(fleet) == {"a": {"foreign": 4}, "b": {"foreign": 1}}
    (warning,) = of(said, "warning")
    assert warning["text"].endswith("device 0 speaks of stage 1, round 3, which has not begun; ignored (said once in a round)")
    assert not of(said, "progress")
    assert not fleet.course.state.failed


def test_the_end_of_an_update_that_is_recorded_is_said_again_without_blame(world):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.round == 2)
    (known, *_) = fleet.course.store.contributions(1, 1)
    counted(fleet)
    fin = messages.Fin(contribution=known.id, traffic={"down": 0, "up": 0})
    fleet.devices[known.participant].tell("fin", fin)
    fleet.quiet()
    assert not any(counted(fleet).values())


def test_names_that_a_sender_makes_up_fill_no_memory(world, said, monkeypatch):
    monkeypatch.setattr(complaints, "MAX_KEYS", 3)
    fleet = undisturbed(world)
    for number in range(10):
        fleet.devices[0].transport.publish(TOPICS.from_device(f"n-{number}", "z"), b"")
    fleet.devices[0].transport.publish(TOPICS.from_device("a", "z"), b"")
    fleet.quiet()
    assert len(of(said, "warning")) == 4
    fleet.server._reception.sum_up()
    assert of(said, "complaints")[0]["devices"] == {
        "n-0": {"topic": 1}, "n-1": {"topic": 1}, "n-2": {"topic": 1}, "others*": {"topic": 7}, "a": {"topic": 1},
    }  # fmt: skip
