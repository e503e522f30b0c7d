"""What one sender may cost everybody else: a bucket of tokens for each, and a door before the server's queue.

Limits lie far above what an honest device says. A round takes it less than ten messages, a reconnection five, a download at most
four a second, and what it repeats for want of an answer comes later and later.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable

from lwfed.transport.base import Received
from lwfed.wire.topics import FromDevice, FromToken, Stray, Topics, UpdateChunk

MESSAGES_PER_S = 20.0  # of one device, chunks of its update not counted
MESSAGES_AT_ONCE = 200
WAITING_OF_ONE, WAITING_OF_ALL = 16_000_000, 64_000_000  # bytes; a device that floods leaves room for others
OBJECT_BYTES = 500  # that a message takes beside its payload
MAX_KEYS = 20_000  # those who have all their tokens again are forgotten then


class Buckets:
    """For each key `at_once` tokens, of which one comes back after each 1 / `per_s` seconds. Not thread-safe."""

    def __init__(self, per_s: float, at_once: int) -> None:
        self._each_s, self._all_s = 1 / per_s, (at_once + 0.5) / per_s  # the half is for rounding
        self._full_at: dict[Hashable, float] = {}

    def take(self, key: Hashable, now: float) -> bool:
        """Whether there was a token."""
        full_at = max(self._full_at.get(key, now), now) + self._each_s
        if full_at > now + self._all_s:
            return False
        if len(self._full_at) >= MAX_KEYS:
            self._full_at = {one: when for one, when in self._full_at.items() if when > now}
        self._full_at[key] = full_at
        return True


class Excess:
    """What senders say too much, counted on the transport's thread and taken on another."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._changed = threading.Lock()

    def add(self, sender: str) -> None:
        with self._changed:
            self._counts[sender] += 1

    def take(self) -> Counter[str]:
        """Sender -> messages since this was last asked."""
        if not self._counts:
            return Counter()
        with self._changed:
            found, self._counts = self._counts, Counter()
        return found


class Backlog:
    """What waits in the server's queue of messages that the door does not count, in bytes.

    These are chunks, of which a slot lets come as many as there are. The server may be held up for hours, by a database that
    is away. Those without room are asked for again.
    """

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self._waiting: Counter[str] = Counter()  # by sender
        self._total = 0
        self._changed = threading.Lock()

    def counts(self, message: Received) -> bool:
        """Whether it is for this to admit, and not for the door."""
        return isinstance(self._topics.parse(message.topic), UpdateChunk)

    def admits(self, message: Received) -> bool:
        """Whether there is room for it, which it then takes. Asked on the transport's thread."""
        sender, size = self._sender(message), _bytes_of(message)
        with self._changed:
            if self._waiting[sender] + size > WAITING_OF_ONE or self._total + size > WAITING_OF_ALL:
                return False
            self._waiting[sender] += size
            self._total += size
            return True

    def handled(self, message: Received) -> None:
        """One that was admitted waits no longer."""
        sender, size = self._sender(message), _bytes_of(message)
        with self._changed:
            self._total -= size
            self._waiting[sender] -= size
            if not self._waiting[sender]:
                del self._waiting[sender]

    def _sender(self, message: Received) -> str:
        topic = self._topics.parse(message.topic)
        return topic.device if isinstance(topic, UpdateChunk) else ""


def _bytes_of(message: Received) -> int:
    return len(message.payload) + len(message.topic) + OBJECT_BYTES


class Door:
    """Asked on the transport's thread, so that a flood fills no queue; `clock` goes on while the server is held up."""

    def __init__(self, topics: Topics, clock: Callable[[], float]) -> None:
        self._topics, self._clock = topics, clock
        self._buckets = Buckets(MESSAGES_PER_S, MESSAGES_AT_ONCE)
        self._excess = Excess()
        self._changed = threading.Lock()

    def admits(self, topic: str) -> bool:
        match self._topics.parse(topic):
            case FromDevice(sender) | Stray(sender):
                pass
            case FromToken(token):
                sender = f"enrol.{token}"  # its MQTT user: no device has such a name
            case _:
                return True
        with self._changed:
            if self._buckets.take(sender, self._clock()):
                return True
        self._excess.add(sender)
        return False

    def excess(self) -> Counter[str]:
        """Sender -> messages that were not admitted since this was last asked."""
        return self._excess.take()


class Repeats:
    """Of offers that wait in the server's queue: devices repeat what nobody answers, and a server that is behind would stay behind."""

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self._waiting: set[Received] = set()

    def is_one(self, message: Received) -> bool:
        """Whether the same offer waits already. Asked on the transport's thread; otherwise the message is put into the queue."""
        match self._topics.parse(message.topic):
            case FromDevice(_, "offer"):
                if message in self._waiting:
                    return True
                self._waiting.add(message)
        return False

    def handled(self, message: Received) -> None:
        self._waiting.discard(message)
