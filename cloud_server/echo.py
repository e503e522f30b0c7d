"""Whether the broker still tells us all that it has for us.

mosquitto drops what it cannot queue for a client (2.0: beyond `max_queued_messages`), acknowledgements of what that client
has published too. Each takes one of the places for messages under way, of ours or of the broker's, until the connection
ends: when all are taken, a server can say nothing more, or hears nothing more, on a connection that looks well. So after
many messages it says something to itself, and connects anew when that does not come back or what it said before is still
unacknowledged.
"""

from __future__ import annotations

from random import Random

from lwfed.transport.base import Transport
from lwfed.wire.commands import Command, Reconnect, Send
from lwfed.wire.retry import Retry
from lwfed.wire.topics import Topics

AFTER = 500  # messages received: fewer than any broker queues, so that after each loss there is a question
ASK_EVERY_S = 4.0
SUSPECT_S = 15.0  # what the broker passes on after a flood is behind what it had queued before


class Echo:
    def __init__(self, topics: Topics, transport: Transport) -> None:
        self._topic, self._transport = topics.echo, transport
        self._retry = Retry(Random(0), ASK_EVERY_S, ASK_EVERY_S)
        self._received = 0
        self._before = 0  # messages that were published before the question
        self._taken = 0  # of all, by the broker, when we last looked
        self._returned = False  # the question did, but what was said before is unacknowledged

    def received(self) -> None:
        """A message, of whatever kind. On the transport's thread."""
        self._received += 1

    def begin(self) -> None:
        """There is a new connection, on which nothing is lost yet."""
        self._received = 0
        self._retry.stop()

    def answered(self) -> None:
        """What we said has come back. The broker acknowledges in order: then it has acknowledged what was said before."""
        self._returned = self._transport.pending > self._transport.published - self._before
        if not self._returned:
            self._retry.stop()

    def poll(self, now: float) -> list[Command]:
        taken, self._taken = self._taken, self._transport.published - self._transport.pending
        if self._retry.due is None:
            if self._received < AFTER:
                return []
            self._received, self._returned = 0, False
            self._retry.now()
        elif not self._returned and taken != self._taken < self._before:  # on a slow link it waits for what was said before
            self._retry.wait_longer(now)
        if self._retry.suspect(now, SUSPECT_S):
            return [Reconnect("the broker does not pass on what we say to ourselves")]
        if not self._retry.is_due(now):
            return []
        self._before = self._transport.published
        self._retry.asked(now)
        return [Send(self._topic, b"echo")]

    def next_wakeup(self) -> float | None:
        return self._retry.due
