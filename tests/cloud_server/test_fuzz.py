"""Nothing that arrives ends a server or changes a bit of its run."""

from random import Random

from lwfed.transport.base import Received
from lwfed.wire import messages
from lwfed.wire.topics import Topics

from ..wire.decoders import mutated
from ..wire.samples import SAMPLES
from .fleets import undisturbed

TOPICS = Topics("default")


def forged(random, name, kind, known):
    payload = messages.encode(SAMPLES[kind]).replace(b"ab" * 32, random.choice(known).encode())
    return Received(TOPICS.from_device(name, kind), payload if random.random() < 0.2 else mutated(random, (payload,)))


def test_whatever_strangers_say_the_run_ends_with_the_same_bits(world):
    """Of a device that never greeted; and once nothing is to be gained, greetings too."""
    expected = undisturbed(world).finish()
    fleet, random = undisturbed(world), Random(1)
    kinds = sorted(messages.UP.keys() - {"hello"})
    count = 0

    def until():
        nonlocal count
        known = [*fleet.course.state.parts.values()] or ["00" * 32]
        for _ in range(10):
            count += 1
            event = forged(random, f"stranger-{count % 50}", random.choice(kinds), known)
            if random.random() < 0.2:
                event = Received(TOPICS.update_chunk("stranger-1", "w0", "c0" * 16, count % 9), random.randbytes(99))
            fleet.server.handle(event)
        return fleet.course.state.over

    fleet.settle(until)
    assert fleet.finish() == expected
    assert count >= 100
    for number in range(200):
        fleet.server.handle(forged(random, f"stranger-{number % 50}", random.choice(["hello", "state"]), ["00" * 32]))
    assert fleet.course.state.over
