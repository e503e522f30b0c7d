"""Which of the messages that arrive come into the server's queue, and who sends what does not."""

from __future__ import annotations

from collections.abc import Callable

from lwfed.cloud_server.echo import Echo
from lwfed.cloud_server.limits import MESSAGES_PER_S, Backlog, Door, Repeats
from lwfed.cloud_server.litter import Litter
from lwfed.transport.base import Received
from lwfed.wire.topics import Topics


class Intake:
    """Without a `door` messages are not limited."""

    def __init__(self, topics: Topics, litter: Litter, echo: Echo, door: Door | None) -> None:
        self._litter, self._echo, self._door = litter, echo, door
        self._backlog, self._repeats = Backlog(topics), Repeats(topics)

    def admits(self, message: Received) -> bool:
        """Asked on the transport's thread."""
        if self._echo.hears(message.topic) or self._litter.takes(message):
            return False
        if self._backlog.counts(message):
            return self._backlog.admits(message)
        return (self._door is None or self._door.admits(message.topic)) and not self._repeats.is_one(message)

    def handled(self, message: Received) -> None:
        """One that was admitted waits no longer."""
        self._repeats.handled(message)
        if self._backlog.counts(message):
            self._backlog.handled(message)

    def report(self, complain: Callable[[str, str, str, int], object]) -> None:
        """Complain of who has sent too much since the last time."""
        for sender, number in self._litter.excess().items():
            complain(sender, "retained", f"{sender} leaves messages at the broker, which no agent does; they are cleared", number)
        for sender, number in (self._door.excess() if self._door else {}).items():
            text = f"{sender} sends more than {MESSAGES_PER_S:g} messages a second: what exceeds that is dropped"
            complain(sender, "flood", text, number)
