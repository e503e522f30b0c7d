"""Nothing that arrives ends an agent, but a server that speaks no version of its protocol."""

from random import Random

import pytest

from lwfed.errors import ProtocolMismatch
from lwfed.transport.base import Received
from lwfed.wire import messages
from lwfed.wire.topics import Topics

from ..wire.decoders import mutated
from ..wire.samples import SAMPLES

TOPICS = Topics("default")


def said(random, device, known):
    """A topic that the device listens to, and what somebody who knows the protocol might say there; `known` are digests in use."""
    kind = random.choice([*messages.DOWN, "server-state", "run", "chunk"])
    if kind == "chunk":
        return TOPICS.blob_chunk(random.choice(known), random.randrange(9)), random.randbytes(random.randrange(1025))
    payload = messages.encode(SAMPLES[kind]).replace(b"cifar10", b"demo").replace(b"ab" * 32, random.choice(known).encode())
    topic = {"server-state": TOPICS.server_state, "run": TOPICS.run}.get(kind) or TOPICS.to_device(device, kind)
    return topic, payload if random.random() < 0.2 else mutated(random, (payload,))


@pytest.mark.parametrize("seed", range(5))
def test_whatever_a_device_is_told_it_goes_on(world, seed):
    server, device = world.joined()
    server.announce()
    server.assign(device.id)
    world.settle(1)
    random, known = Random(seed), [path.name for path in (device.root / "model").iterdir() if path.is_file()]
    for _ in range(300):
        topic, payload = said(random, device.id, known)
        device.queue.append(Received(topic, payload))
        device.step(world.now)
        world.now += 0.01
        if device.exit is not None:
            assert isinstance(device.exit.error, ProtocolMismatch)
            device.exit = None
    assert any(text.startswith("ignored a message") for text in device.texts("warning"))
