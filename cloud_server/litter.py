"""What devices leave at the broker: a retained message takes its memory for ever, and comes again with every connection.

Only a device's state is retained, one small message. Permissions cannot say so, so the server clears all else, as fast as
the broker takes it. What is too much to be remembered is found once more when the rest is cleared.
"""

from __future__ import annotations

from collections.abc import Container

from lwfed.cloud_server.news import News
from lwfed.transport.base import Received
from lwfed.wire.commands import Command, Send, Subscribe, Unsubscribe
from lwfed.wire.topics import FromDevice, Stray, Topics, UpdateChunk

MAX_FOUND = 10_000  # topics to be cleared
MAX_TOLD = 1000  # names in topics are whatever a sender likes


class Litter:
    def __init__(self, topics: Topics, news: News) -> None:
        self._topics, self._news = topics, news
        self._found: dict[str, None] = {}  # topics to be cleared, in order
        self._more = False  # there were too many
        self._told: set[str] = set()  # devices that were warned of

    def take(self, message: Received, revoked: Container[str]) -> bool:
        """Whether a message is retained and must not be; it is cleared then. May stay: a state, unless its device was revoked."""
        if not message.retained:
            return False
        match self._topics.parse(message.topic):
            case FromDevice(device, "state"):
                if device not in revoked:
                    return False
            case FromDevice(device) | UpdateChunk(device) | Stray(device):
                self._warn(device)
        if message.payload:  # else it has just been cleared
            if len(self._found) < MAX_FOUND:
                self._found[message.topic] = None
            else:
                self._more = True
        return True

    def miss(self) -> None:
        """One was not looked at, for want of room: all that is still there is to come again. On any thread."""
        self._more = True

    def find(self, device: str) -> list[Command]:
        """Have everything sent once more that a device has retained."""
        filter = self._topics.all_from_device(device)
        return [Subscribe(filter), Unsubscribe(filter)]

    def poll(self, room: int, idle: bool) -> list[Command]:
        """With room for so many messages; `idle`: none waits to be handled, which what comes again would meet."""
        commands: list[Command] = []
        while self._found and len(commands) < room:
            topic = next(iter(self._found))
            del self._found[topic]
            commands.append(Send(topic, b"", retain=True))
        if self._more and not self._found and idle:
            self._more = False
            commands.append(Subscribe(self._topics.from_all_devices))
        return commands

    def _warn(self, device: str) -> None:
        if device not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(device)
            self._news.warning(f"device {device} leaves messages at the broker, which no agent does; they are cleared (said once)")
