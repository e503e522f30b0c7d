"""Whether the broker still tells us all that it has for us.

mosquitto drops what it cannot queue for a client (2.0: beyond `max_queued_messages`), acknowledgements of what that client
has published too. Each takes one of the places for messages under way, of ours or of the broker's, until the connection
ends: when all are taken, a server can say nothing more, or hears nothing more, on a connection that looks well. So after
many messages it says something to itself, and connects anew when that does not come back or what it said before is still
unacknowledged.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from lwfed.transport.base import Transport
from lwfed.wire.commands import Command, Reconnect, Send
from lwfed.wire.retry import Retry
from lwfed.wire.topics import Topics

AFTER = 500  # messages received: fewer than any broker queues, so that after each loss there is a question
ASK_EVERY_S = 4.0
TRIES = 3  # connections, for a broker that has never passed it on: perhaps it must not
UNHEARD = "a flood may silence it without a sign; allow that topic to it (docs/BROKER.md)"
SUSPECT_S = 15.0  # what the broker passes on after a flood is behind what it had queued before


class Echo:
    def __init__(self, topics: Topics, transport: Transport, warn: Callable[[str], None]) -> None:
        self._topic, self._transport, self._warn = topics.echo, transport, warn
        self._retry = Retry(Random(0), ASK_EVERY_S, ASK_EVERY_S)
        self._received = AFTER  # the first question is asked at once, when nobody floods
        self._heard = False  # what we said, since we last looked
        self._ever = False
        self._fruitless = 0  # connections on which it was not heard, before it ever was
        self._before = 0  # messages that were published before the question
        self._taken = 0  # of all, by the broker, when we last looked
        self._returned = False  # the question did, but what was said before is unacknowledged

    def hears(self, topic: str) -> bool:
        """Whether a message of the topic is what we said to ourselves. On the transport's thread."""
        self._received += 1
        self._heard = self._heard or topic == self._topic
        return topic == self._topic

    def begin(self) -> None:
        """There is a new connection, on which nothing is lost yet that came before it."""
        if self._retry.due is not None and not self._ever:
            self._fruitless += 1
            self._received = AFTER
            if self._fruitless == TRIES:
                self._warn(f"the broker does not pass on what this server publishes to {self._topic}: {UNHEARD}")
        self._heard = False
        self._retry.stop()

    def poll(self, now: float) -> list[Command]:
        if self._fruitless >= TRIES:
            return []
        if self._heard:
            self._answered()
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

    def _answered(self) -> None:
        """The broker acknowledges in order: when what we said has come back, it has acknowledged what was said before."""
        self._heard, self._ever = False, True
        self._returned = self._transport.pending > self._transport.published - self._before
        if not self._returned:
            self._retry.stop()

    def next_wakeup(self) -> float | None:
        return self._retry.due
