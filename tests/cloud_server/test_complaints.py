"""What the server has against devices is counted, summed up and kept."""

from lwfed.cloud_server import complaints
from lwfed.cloud_server.overview import overview
from lwfed.wire import messages
from lwfed.wire.messages import encode
from lwfed.wire.topics import Topics

from .fleets import of, undisturbed

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
    assert summary["devices"] == {"a": {"topic": 2, "slot": 1}, "stranger": {"unknown": 2}}
    assert "round 1: complaints about a (slot 1, topic 2), stranger (unknown 2)" in summary["text"]
    fleet.kill()
    fleet.start()
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    device.transport.publish("lwfed/default/d/a/up/z", b"")
    fleet.finish()
    assert "complaints: slot 1, topic 3" in overview(fleet.root / "server")


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
