"""Both ends of both transfers at once, over a link that drops, doubles, reorders and breaks."""

from __future__ import annotations

from random import Random

import pytest

from lwfed.transport.memory import Faults, MemoryBroker
from lwfed.wire.download import GOT_EVERY_S

from .fleet import CHUNK_BYTES, TOPICS, Device, Server, World, blob

DEVICES = 4


def fleet(tmp_path, broker: MemoryBroker, random: Random, devices: int = DEVICES, slots: int = 2):
    world = World(broker)
    server = Server(world, tmp_path, slots)
    contents = [blob(random, random.choice((0, 1, CHUNK_BYTES, 5 * CHUNK_BYTES, random.randrange(20_000)))) for _ in range(4)]
    refs = [server.models.put(content) for content in contents]
    members = [Device(world, tmp_path, f"d{number}", refs, blob(random, random.randrange(1, 9000))) for number in range(devices)]
    world.nodes = [server, *members]
    return world, server, members, contents


def check(server: Server, members: list[Device], contents: list[bytes]) -> None:
    for device in members:
        assert [device.store.read(ref.id) for ref in device.refs] == contents
        assert device.upload.state == "done"
    assert sorted(server.recorded.values()) == sorted(device.update for device in members)
    assert server.recordings == len(members)


@pytest.mark.parametrize("seed", range(300))
def test_everything_arrives_over_a_bad_link(tmp_path, seed):
    random = Random(seed)
    faults = Faults(seed, drop=random.choice((0, 0.05, 0.3)), duplicate=random.choice((0, 0.2)), reorder=random.choice((0, 0.5)))
    world, server, members, contents = fleet(tmp_path, MemoryBroker(faults), random)
    harm = [world.broker.cut, *(restart_of(node) for node in world.nodes)]
    harm_left = random.choice((0, 2, 8))

    def trouble() -> None:
        nonlocal harm_left
        if harm_left and random.random() < 0.05:
            harm_left -= 1
            action = random.choice(harm)
            action(random.choice(world.nodes).name)

    world.run(lambda: all(device.finished for device in members), trouble)
    check(server, members, contents)


def restart_of(node):
    return lambda _name: node.restart()


def test_without_faults_every_chunk_is_sent_once_for_all(tmp_path):
    world, server, members, contents = fleet(tmp_path, MemoryBroker(), Random(5), devices=50, slots=8)
    world.run(lambda: all(device.finished for device in members))
    check(server, members, contents)
    assert server.broadcast.sent_chunks == sum(-(-len(content) // CHUNK_BYTES) for content in contents)
    questions = [topic for _, topic, _ in world.broker.log if topic.endswith("/up/need")]
    assert len(questions) == 2 * len(members)  # for the manifests, for the chunks
    assert world.now < 10


def test_idle_means_silence(tmp_path):
    world, server, members, _ = fleet(tmp_path, MemoryBroker(), Random(1))
    world.run(lambda: all(device.finished for device in members))
    world.now += GOT_EVERY_S  # the last chunks are reported
    for node in world.nodes:
        node.poll()
    world.broker.pump()
    for node in world.nodes:
        node.poll()
    assert [when for node in world.nodes for when in node.next_wakeup(world.now) if when is not None] == []
    assert server.transport.pending == 0


def test_a_broker_that_dies_in_the_middle(tmp_path):
    world, server, members, contents = fleet(tmp_path, MemoryBroker(), Random(2))
    steps = 0

    def trouble() -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            world.broker.stop()
            world.now += 30
            world.broker.start()

    world.run(lambda: all(device.finished for device in members), trouble)
    check(server, members, contents)
    assert server.broadcast.sent_chunks <= 1.1 * sum(-(-len(content) // CHUNK_BYTES) for content in contents)


@pytest.mark.parametrize("who", ["server", "device"])
def test_an_upload_resumes_where_it_was_after_a_restart(tmp_path, who):
    world = World(MemoryBroker())
    server = Server(world, tmp_path, slots=1)
    device = Device(world, tmp_path, "d0", [], Random(0).randbytes(200 * CHUNK_BYTES))
    world.nodes = [server, device]
    chunks = TOPICS.update_chunk("d0", "w0", device.upload._offer.contribution, 0).removesuffix("0")

    def sent() -> int:
        return sum(topic.startswith(chunks) for _, topic, _ in world.broker.log)

    def trouble() -> None:
        node = server if who == "server" else device
        if 60 <= sent() < 150 and node not in harmed:
            harmed.append(node)
            node.restart()

    harmed: list[object] = []
    world.run(lambda: device.finished, trouble)
    assert len(harmed) == 1
    check(server, [device], [])
    assert sent() <= 220


def test_a_download_resumes_where_it_was_after_a_restart_of_the_device(tmp_path):
    world = World(MemoryBroker())
    server = Server(world, tmp_path, slots=1)
    content = Random(0).randbytes(40 * CHUNK_BYTES)
    device = Device(world, tmp_path, "d0", [server.models.put(content)], b"x")
    world.nodes = [server, device]
    world.run(lambda: server.broadcast.sent_chunks >= 20)
    assert not device.downloads.complete
    device.restart()
    world.run(lambda: device.finished)
    check(server, [device], [content])
    assert server.broadcast.sent_chunks <= 40 + 4, "what was on its way to the device that was killed"


def test_what_one_device_has_lost_comes_to_no_other_one(tmp_path):
    """Its connection breaks while the chunks are on their way to all, and they come slowly to another one."""
    world = World(MemoryBroker())
    server = Server(world, tmp_path, slots=1)
    content = Random(0).randbytes(100 * CHUNK_BYTES)
    broken, slow = members = [Device(world, tmp_path, name, [server.models.put(content)], b"x") for name in ("broken", "slow")]
    world.nodes = [server, *members]
    world.run(lambda: server.broadcast.sent_chunks >= 20)
    for device in members:
        world.broker.stall(device.name)
    world.run(lambda: server.broadcast.sent_chunks >= 60)
    world.broker.cut(broken.name)
    world.run(lambda: broken.downloads.complete)
    world.broker.resume(slow.name)
    world.run(lambda: all(device.finished for device in members))
    check(server, members, [content])
    assert server.broadcast.sent_chunks >= 140
    assert slow.chunks == 100


def test_a_server_that_cuts_blobs_differently_after_its_restart(tmp_path, monkeypatch):
    world = World(MemoryBroker())
    server = Server(world, tmp_path, slots=1)
    content = Random(0).randbytes(40 * CHUNK_BYTES)
    device = Device(world, tmp_path, "d0", [server.models.put(content)], b"x")
    world.nodes = [server, device]
    world.run(lambda: server.broadcast.sent_chunks >= 20)
    server.restart()
    server.broadcast._chunk_bytes = 2 * CHUNK_BYTES
    world.run(lambda: device.finished)
    check(server, [device], [content])


def test_more_devices_than_slots_take_turns(tmp_path):
    world, server, members, contents = fleet(tmp_path, MemoryBroker(), Random(3), devices=20, slots=2)
    most = 0

    def watch() -> None:
        nonlocal most
        most = max(most, len(server.inbox._granted))

    world.run(lambda: all(device.finished for device in members), watch)
    check(server, members, contents)
    assert most == 2
    assert world.now < 30
