"""What befalls a server in months of service: it goes on."""

import pytest

from lwfed.cloud_server import litter, orders
from lwfed.cloud_server.limits import WAITING_OF_ONE
from lwfed.cloud_server.orders import Order
from lwfed.errors import DiskTrouble, PortInUse, StateError, Unreachable
from lwfed.transport.base import Connected, Disconnected, Received
from lwfed.wire.messages import Need, Want, encode
from lwfed.wire.topics import BlobChunk, Topics

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


def test_what_the_door_does_not_count_does_not_fill_a_queue_that_nobody_empties(world):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    before = fleet.server._queue.qsize()
    for _ in range(1000):
        fleet.server._arrive(Received(TOPICS.update_chunk("greedy", "w0", "c", 0), bytes(100_000)))
    chunks = WAITING_OF_ONE // 100_600
    assert fleet.server._queue.qsize() == before + chunks
    fleet.server._arrive(Received(TOPICS.update_chunk("a", "w0", "c", 0), bytes(100_000)))
    assert fleet.server._queue.qsize() == before + chunks + 1, "others have room"
    fleet.finish()
    before = fleet.server._queue.qsize()
    fleet.server._arrive(Received(TOPICS.update_chunk("greedy", "w0", "c", 0), bytes(100_000)))
    assert fleet.server._queue.qsize() == before + 1, "and it has some again"


def test_even_the_largest_litter_is_cleared(world):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    litterer = fleet.broker.transport()
    litterer.open("litterer", None, lambda event: None)
    topic = TOPICS.update_chunk("a", "w0", "c", 0)
    litterer.publish(topic, bytes(WAITING_OF_ONE + 1), retain=True)
    fleet.quiet()
    assert topic not in fleet.broker.retained
    fleet.finish()


def test_litter_that_there_was_no_room_for_is_found_later(world, monkeypatch):
    """And all that has been seen of it is cleared meanwhile."""
    monkeypatch.setattr(litter, "MAX_FOUND_BYTES", 100 * (litter.OBJECT_BYTES + 50))
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    fleet.kill()
    litterer = fleet.broker.transport()
    litterer.open("litterer", None, lambda event: None)
    topics = [TOPICS.update_chunk("a", "w0", f"c{number}", 0) for number in range(450)]
    for topic in topics:
        litterer.publish(topic, b"x", retain=True)
    fleet.broker.pump()
    fleet.start()
    fleet.broker.pump()
    assert fleet.server._queue.qsize() < 10, "litter does not come in"
    subscriptions = []
    subscribe = fleet.server._transport.subscribe
    monkeypatch.setattr(fleet.server._transport, "subscribe", lambda filter: (subscriptions.append(filter), subscribe(filter)))
    fleet.settle(until=lambda: not fleet.broker.retained.keys() & set(topics))
    fleet.finish()
    assert 2 <= len(subscriptions) <= 10


def test_a_broker_that_cannot_be_started_again_yet_is_tried_again(world, said):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    dead, refused = Unreachable("it ended with code -9"), StateError("cannot start the broker: no process left")
    answers = ["", dead, dead, refused, "the broker had died and was started again"]

    def revive():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    fleet.server._revive = revive
    for _ in range(5):
        fleet.server.handle(Disconnected(Unreachable("gone")))
    endings = ("until it is back: gone", f"again: {dead}", f"again: {refused}", "the broker had died and was started again")
    texts = [warning["text"] for warning in of(said, "warning")][-4:]
    assert [text.endswith(ending) for text, ending in zip(texts, endings, strict=True)] == [True] * 4, texts
    fleet.server.handle(Connected())
    fleet.finish()


def test_whoever_has_taken_the_port_of_a_broker_that_died_is_not_followed(world):
    fleet = undisturbed(world)

    def revive():
        raise PortInUse("something else listens on 127.0.0.1:1883")

    fleet.server._revive = revive
    with pytest.raises(PortInUse):
        fleet.server.handle(Disconnected(Unreachable("gone")))


def test_an_order_is_not_lost_with_the_disk_that_keeps_it_from_being_carried_out(world, monkeypatch):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    orders.give(root(fleet), Order(do="pause"))

    def full(*_):
        raise DiskTrouble("database or disk is full")

    monkeypatch.setattr(fleet.course.store, "step", full)
    with pytest.raises(DiskTrouble):
        fleet.server.take_orders()
    fleet.kill()
    fleet.start()
    fleet.quiet()
    assert fleet.course.state.paused


def test_a_part_of_the_model_that_the_disk_has_spoilt_needs_somebody(world):
    """Nothing makes it again: a service that was started again and again would hide that."""
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    blob = fleet.course.state.parts["stem"]
    fleet.kill()
    spoil(root(fleet) / "model" / blob)
    with pytest.raises(StateError, match="was deleted or damaged") as raised:
        fleet.start()
    assert raised.value.exit_code == 73


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


def rot(fleet, blob):
    """While the server runs."""
    path = root(fleet) / "model" / blob
    path.write_bytes(bytes(path.stat().st_size))


def ask_for(fleet, blob):
    """A device asks for manifest and first chunk, until the server has nothing more to send."""
    fleet.broker.log.clear()
    asker = fleet.broker.transport()
    asker.open("asker", None, lambda event: None)
    for missing in (None, "0"):
        need = Need(blobs=(Want(id=blob, missing=missing),))
        asker.publish(TOPICS.from_device("a", "need"), encode(need))
    fleet.settle(until=lambda: fleet.server._broadcast.next_wakeup(fleet.now) is None)


def was_sent(fleet, blob):
    return blob in [topic.blob for _, name, _ in fleet.broker.log if isinstance(topic := TOPICS.parse(name), BlobChunk)]


@pytest.mark.parametrize("what", ["patch", "graph", "config"])
def test_what_can_be_done_without_rots_and_the_run_goes_on(world, said, what):
    fleet = world("transfer.codec=int8", "train.prefix=auto")
    fleet.start()
    for name in "ab":
        fleet.join(name, takes=lambda stage, round: 10.0)
    fleet.settle(until=lambda: (fleet.course.state.stage, fleet.course.state.round, fleet.course.state.phase) == (2, 2, "training"))
    run = fleet.announced[-1]
    blob = {"patch": next(iter(run.patches.values()))[-1].blob, "graph": next(iter(run.graphs.values())), "config": run.config}[what].id
    rot(fleet, blob)
    ask_for(fleet, blob)
    assert not was_sent(fleet, blob)
    assert [warning["text"].split("warning")[1].strip() for warning in of(said, "warning")] == ["a file of the model was damaged on disk"]
    assert (blob in fleet.announced[-1].model_dump_json()) == fleet.course.blobs.has(blob) == (what == "config")
    fleet.finish()


def test_a_part_of_the_model_that_rots_is_not_sent_and_needs_somebody(world):
    fleet = undisturbed(world)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    blob = fleet.course.state.parts["stem"]
    rot(fleet, blob)
    with pytest.raises(StateError, match="was deleted or damaged") as raised:
        ask_for(fleet, blob)
    assert raised.value.exit_code == 73
    assert not was_sent(fleet, blob)
