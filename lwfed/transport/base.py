"""What agent and server need of a connection to a broker.

Everything that happens is delivered as an event to one callable, which may run on a thread of the transport's own
and therefore only enqueues. Nothing connects before `open`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from lwfed.errors import TransportError
from lwfed.wire.commands import Command, Reconnect, Send, Subscribe, Unsubscribe


@dataclass(frozen=True)
class Connected:
    """A session is up and all filters are subscribed again; sessions are clean, so state must be sent anew."""


@dataclass(frozen=True)
class Disconnected:
    """The session is gone; the transport goes on trying by itself."""

    reason: TransportError


@dataclass(frozen=True)
class Received:
    topic: str
    payload: bytes
    retained: bool = False  # the broker keeps it; in MQTT 3.1.1 this is known of what it kept before we subscribed only


@dataclass(frozen=True)
class Sent:
    """The broker has taken over a message: there is room for another one. No proof that anybody received it."""


Event = Connected | Disconnected | Received | Sent


@dataclass(frozen=True)
class Will:
    """What the broker says in our name when the connection breaks. Retained."""

    topic: str
    payload: bytes


class Transport(ABC):
    received_bytes: int = 0  # of MQTT packets, headers included
    sent_bytes: int = 0
    published: int = 0  # messages, over all connections
    packet_limit: int | None = None  # the broker's maximum packet size, where it says so

    @abstractmethod
    def open(self, client_id: str, will: Will | None, deliver: Callable[[Event], None]) -> None:
        """Start connecting; returns at once. Every outcome arrives as an event."""

    @abstractmethod
    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand over a message for delivery at least once. Dropped when not connected: machines repeat what matters."""

    @abstractmethod
    def subscribe(self, filter: str) -> None:
        """Kept over reconnections until `unsubscribe`."""

    @abstractmethod
    def unsubscribe(self, filter: str) -> None: ...

    @property
    @abstractmethod
    def pending(self) -> int:
        """Messages published but not yet taken over by the broker."""

    @abstractmethod
    def reconnect(self) -> None:
        """Drop the connection and make a new one."""

    @abstractmethod
    def close(self) -> None:
        """End the session after what is pending was sent (bounded wait); idempotent. The will is not sent."""

    def execute(self, command: Command) -> None:
        match command:
            case Send(topic, payload, retain):
                self.publish(topic, payload, retain=retain)
            case Subscribe(filter):
                self.subscribe(filter)
            case Unsubscribe(filter):
                self.unsubscribe(filter)
            case Reconnect():
                self.reconnect()
