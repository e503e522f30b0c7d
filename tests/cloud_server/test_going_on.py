"""What befalls a server in months of service: it goes on."""

import pytest

from lwfed.cloud_server import orders
from lwfed.cloud_server.limits import UNCOUNTED
from lwfed.cloud_server.orders import Order
from lwfed.errors import StateError, Unreachable
from lwfed.transport.base import Connected, Disconnected, Received
from lwfed.wire.topics import Topics

from .fleets import of, undisturbed

TOPICS = Topics("default")


def root(fleet):
    return fleet.root / fleet.state


def spoil(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("folder", ["model", "updates", "orders"])
def test_a_folder_of_somebody_else_in_its_own_is_left_alone(world, folder):
    fleet = undisturbed(world)
    theirs = root(fleet) / folder / ("000000001.json" if folder == "orders" else "lost+found")
    theirs.mkdir(parents=True)
    fleet.server.take_orders()
    fleet.finish()
    assert theirs.is_dir()


@pytest.mark.parametrize("kind", ["patch", "residual"])
def test_a_file_that_only_saves_bytes_stops_no_run_when_the_disk_spoils_it(world, kind):
    fleet = world("transfer.codec=int8")
    fleet.start()
    for name in "ab":
        fleet.join(name, takes=lambda stage, round: 10.0)
    fleet.settle(until=lambda: (fleet.course.state.round, fleet.course.state.phase) == (2, "training"))
    state = fleet.course.state
    blob = next(iter(state.residuals.values())) if kind == "residual" else next(iter(state.patches.values()))[-1][1]
    fleet.kill()
    spoil(root(fleet) / "model" / blob)
    fleet.start()
    assert fleet.finish()


def test_a_part_is_patched_from_after_the_last_patch_that_was_lost(world):
    fleet = world("transfer.codec=int8")
    fleet.start()
    refs = [fleet.course.blobs.put(bytes([number])) for number in range(4)]
    steps = tuple((f"{number:064x}", ref.id) for number, ref in enumerate(refs))
    assert [patch.blob for patch in fleet.course._patches(steps)] == refs
    spoil(root(fleet) / "model" / refs[1].id)
    fleet.course.blobs._refs.pop(refs[1].id)  # as after a new start
    assert [patch.blob for patch in fleet.course._patches(steps)] == refs[2:]
    fleet.course.blobs.remove(refs[3].id)
    assert fleet.course._patches(steps) == ()


@pytest.mark.parametrize(
    ("topic", "retained"),
    [
        (TOPICS.update_chunk("a", "w0", "c", 0), False),
        (TOPICS.update_chunk("a", "w0", "c", 0), True),
        (TOPICS.from_device("a", "beat"), True),
        (TOPICS.from_device("a", "offer"), True),
    ],
)
def test_what_no_bucket_counts_does_not_fill_a_queue_that_nobody_empties(world, topic, retained):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    for _ in range(3 * UNCOUNTED):
        fleet.server._arrive(Received(topic, b"x", retained))
    assert fleet.server._queue.qsize() == UNCOUNTED
    fleet.finish()
    for _ in range(UNCOUNTED):
        fleet.server._arrive(Received(topic, b"x", retained))
    assert fleet.server._queue.qsize() == UNCOUNTED, "there is room again"


def test_litter_that_there_was_no_room_for_is_found_later(world):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    litterer = fleet.broker.transport()
    litterer.open("litterer", None, lambda event: None)
    topics = [TOPICS.update_chunk("a", "w0", f"c{number}", 0) for number in range(UNCOUNTED + 100)]
    for topic in topics:
        litterer.publish(topic, b"x", retain=True)
        fleet.broker.pump()
    assert fleet.server._queue.qsize() <= UNCOUNTED + 100
    fleet.quiet()
    assert [topic for topic in topics if topic in fleet.broker.retained] == []


def test_a_broker_that_cannot_be_started_again_yet_is_tried_again(world, said):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    answers = [Unreachable("the mosquitto broker ended with code -9"), StateError("cannot start the broker: no process left"), True]

    def revive():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    fleet.server._revive = revive
    for _ in range(3):
        fleet.server.handle(Disconnected(Unreachable("gone")))
    texts = [warning["text"] for warning in of(said, "warning")]
    assert [text for text in texts if "cannot be started again: the mosquitto broker ended" in text] != []
    assert texts[-1].endswith("the broker had died and was started again")
    fleet.server.handle(Connected())
    fleet.finish()


def test_an_order_to_go_on_waits_until_it_is_known_who_is_there(world):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    orders.give(root(fleet), Order(do="pause"))
    fleet.server.take_orders()
    fleet.settle(until=lambda: fleet.course.state.phase == "waiting")
    fleet.kill()
    for name in "ab":
        fleet.broker.cut(name, reconnect=False)
    orders.give(root(fleet), Order(do="resume"))
    fleet.start()
    fleet.server.take_orders()
    assert fleet.course.state.paused
    fleet.quiet()
    state = fleet.course.state
    assert not state.paused
    assert orders.waiting(root(fleet)) == []
    assert (state.phase, state.devices) == ("waiting", {0: "away", 1: "away"})


def test_a_server_that_was_told_to_end_does_not_wait_for_a_database_that_goes_then(world):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    fleet.server._on_signal()
    with pytest.raises(SystemExit):
        fleet.course.store.database.tell("the database is away")
