"""What devices leave at the broker: a retained message takes its memory for ever, and comes again with every connection.

Only a device's state is retained, one small message. Permissions cannot say so, so the server clears all else, a few at a
time when the broker has taken everything else. A broker gives a subscriber no more than its queue holds (mosquitto 2.0:
`max_queued_messages` and what the connection has room for) and drops the rest unsaid, and we remember so much only. So
what was found is looked for again: at each device that left something until it has left nothing, then at all of them.
"""

from __future__ import annotations

import threading
from collections import Counter
from itertools import islice

from lwfed.cloud_server.limits import Excess
from lwfed.transport.base import Received
from lwfed.wire.commands import Command, Send, Subscribe, Unsubscribe
from lwfed.wire.topics import FromDevice, FromToken, Stray, Topics, UpdateChunk

AHEAD = 2  # messages that clear and that the broker has not yet taken, when it has taken all else
MAX_FOUND_BYTES = 10_000_000  # of topics to be cleared
OBJECT_BYTES = 100  # that a topic takes beside its letters
MAX_CLEARED = 100  # topics that are remembered once they are cleared: what comes back has few on its way
MAX_LEAVING = 2000
LOOK_EVERY_S = 1.0  # at one device: what comes is what it has left, and its state
LOOK_AT_ALL_EVERY_S = 15.0  # which brings the states of a whole fleet


class Litter:
    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self._excess = Excess()
        self._changed = threading.Lock()  # guards the following
        self._found: dict[str, None] = {}  # topics to be cleared, in order
        self._bytes = 0
        self._cleared: dict[str, None] = {}  # topics whose clearing has not come back to us, in order
        self._leaving: dict[str, None] = {}  # devices to be looked at again, in order
        self._all = False  # all devices are to be looked at again
        self._look_at = self._look_at_all_at = float("-inf")

    def takes(self, message: Received) -> bool:
        """Whether a message is retained and must not be; it is cleared then, unread. Asked on the transport's thread."""
        if self._has_come_back(message):
            return True
        if not message.retained:
            return False
        match self._topics.parse(message.topic):
            case FromDevice(_, "state"):
                return False
            case FromDevice(device) | UpdateChunk(device) | Stray(device):
                self._count(message, device, device)
            case FromToken(token):
                self._count(message, f"enrol.{token}")
        self.clear(message)
        return True

    def clear(self, message: Received) -> None:
        """On any thread."""
        with self._changed:
            if message.payload and message.topic not in self._found and self._bytes < MAX_FOUND_BYTES:
                self._found[message.topic] = None
                self._bytes += len(message.topic) + OBJECT_BYTES

    def excess(self) -> Counter[str]:
        """Sender -> messages that it has left since this was last asked."""
        return self._excess.take()

    def find(self, device: str) -> None:
        """Have everything sent once more that a device has retained."""
        with self._changed:
            self._leave(device)

    def poll(self, now: float, room: int) -> list[Command]:
        """With room for so many messages."""
        with self._changed:
            topics = list(islice(self._found, max(0, room)))
            commands: list[Command] = [Send(topic, b"", retain=True) for topic in topics]
            for topic in topics:
                del self._found[topic]
                self._bytes -= len(topic) + OBJECT_BYTES
                self._cleared[topic] = None
            while len(self._cleared) > MAX_CLEARED:
                del self._cleared[next(iter(self._cleared))]
            return commands if self._found else commands + self._look(now)

    def next_wakeup(self) -> float | None:
        if self._found:
            return None  # until the broker has taken something
        if self._leaving:
            return self._look_at
        return max(self._look_at, self._look_at_all_at) if self._all else None

    def _count(self, message: Received, sender: str, device: str | None = None) -> None:
        self._excess.add(sender)
        if device is not None and message.payload:
            with self._changed:
                self._leave(device)

    def _has_come_back(self, message: Received) -> bool:
        """Whether it is what cleared a topic: not retained by MQTT 3.1.1."""
        if message.payload or not self._cleared:
            return False
        with self._changed:
            return self._cleared.pop(message.topic, "") is None

    def _leave(self, device: str) -> None:
        if len(self._leaving) < MAX_LEAVING:
            self._leaving[device] = None
        else:
            self._all = True

    def _look(self, now: float) -> list[Command]:
        if self._leaving and now >= self._look_at:
            device = next(iter(self._leaving))
            del self._leaving[device]
            self._look_at, self._all = now + LOOK_EVERY_S, True
            self._cleared.clear()  # should one never have come back
            filter = self._topics.all_from_device(device)
            return [Subscribe(filter), Unsubscribe(filter)]
        if self._all and not self._leaving and now >= max(self._look_at, self._look_at_all_at):
            self._look_at_all_at, self._all = now + LOOK_AT_ALL_EVERY_S, False
            return [Subscribe(self._topics.from_all_devices)]
        return []
