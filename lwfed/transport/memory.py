"""A broker in this process, for simulations and tests: deterministic, without threads, sockets or a clock.

It behaves as brokers do, at their worst where a fault is asked for: clean sessions, at least once, retained messages,
wills, wildcards; a publisher's acknowledgement says nothing about delivery. Nothing is delivered but by `pump`.
Not thread-safe: everything happens on the thread that pumps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from random import Random

from lwfed.errors import TransportError, Unreachable
from lwfed.transport.base import Connected, Disconnected, Event, Received, Sent, Transport, Will
from lwfed.transport.packets import matches, publish_bytes

LOG_LENGTH = 10_000


class Faults:
    """Chances, per delivery of a message to a subscriber, of being lost, doubled or overtaken; drawn from `seed`."""

    def __init__(self, seed: int = 0, drop: float = 0.0, duplicate: float = 0.0, reorder: float = 0.0) -> None:
        self._drop = drop
        self._duplicate = duplicate
        self._reorder = reorder
        self.random = Random(seed)

    def copies(self) -> int:
        if self.random.random() < self._drop:
            return 0
        return 2 if self.random.random() < self._duplicate else 1

    def overtakes(self) -> bool:
        return self.random.random() < self._reorder


class MemoryBroker:
    """Routes messages between its transports. `interfere(client, topic, payload)` may say how many copies arrive."""

    def __init__(self, faults: Faults | None = None, log_length: int = LOG_LENGTH) -> None:
        self.retained: dict[str, bytes] = {}
        self.log: deque[tuple[str, str, bytes]] = deque(maxlen=log_length)  # client, topic, payload of what was published
        self.interfere: Callable[[str, str, bytes], int] | None = None
        self._faults = faults or Faults()
        self._clients: dict[str, MemoryTransport] = {}  # all that are open, connected or not
        self._opened = 0  # transports so far; messages go to subscribers in the order in which they were opened
        self._index = _Index()
        self._kept_out: set[str] = set()
        self._running = True
        self._queue: deque[tuple[MemoryTransport, int, Event]] = deque()

    def transport(self) -> MemoryTransport:
        return MemoryTransport(self)

    def pump(self, limit: int | None = None) -> int:
        """Deliver what is queued and what that causes, until nothing is left or `limit` is reached; returns how many."""
        count = 0
        while self._queue and count != limit:
            transport, session, event = self._queue.popleft()
            count += transport._take(session, event)
        return count

    def cut(self, client_id: str, reconnect: bool = True) -> None:
        """Break a connection as a power cut does: what is under way to it is lost, its will is published.

        With `reconnect` it is back at the next pump, else after `restore`.
        """
        client = self._clients[client_id]
        if not reconnect:
            self._kept_out.add(client_id)
        client._lose(Unreachable("the connection was cut"), send_will=True)
        self._admit(client)

    def restore(self, client_id: str) -> None:
        self._kept_out.discard(client_id)
        if client_id in self._clients:
            self._admit(self._clients[client_id])

    def stop(self) -> None:
        """The broker dies: all connections break, retained messages are gone, no will is published."""
        self._running = False
        self.retained.clear()
        for client in self._clients.values():
            client._lose(Unreachable("the broker is down"), send_will=False)

    def start(self) -> None:
        """The broker is back, and so are its clients."""
        self._running = True
        for client in self._clients.values():
            self._admit(client)

    def _open(self, client: MemoryTransport) -> None:
        other = self._clients.pop(client.client_id, None)
        if other is not None:
            self._index.remove(other, other.filters)
            other._lose(Unreachable("another client connected with the same id"), send_will=True)
        self._clients[client.client_id] = client
        self._opened += 1
        client.number = self._opened
        for filter in client.filters:
            self._index.add(client, filter)
        self._admit(client)

    def _close(self, client: MemoryTransport) -> None:
        if self._is_open(client):
            self._index.remove(client, client.filters)
            del self._clients[client.client_id]

    def _is_open(self, client: MemoryTransport) -> bool:
        return self._clients.get(client.client_id) is client

    def _subscribe(self, client: MemoryTransport, filter: str) -> None:
        if self._is_open(client):
            self._index.add(client, filter)
        if client.connected:
            self._send_retained(client, filter)

    def _unsubscribe(self, client: MemoryTransport, filter: str) -> None:
        if self._is_open(client):
            self._index.remove(client, [filter])

    def _admit(self, client: MemoryTransport) -> None:
        if self._running and client.client_id not in self._kept_out and not client.connected:
            client._begin()
            self._enqueue(client, Connected())
            for filter in client.filters:
                self._send_retained(client, filter)

    def _enqueue(self, client: MemoryTransport, event: Event) -> None:
        self._queue.append((client, client.session, event))

    def _send_retained(self, client: MemoryTransport, filter: str) -> None:
        for topic, payload in list(self.retained.items()):
            if matches(filter, topic):
                self._deliver(client, topic, payload)

    def _publish(self, client_id: str, topic: str, payload: bytes, retain: bool) -> None:
        self.log.append((client_id, topic, payload))
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        for client in self._index.subscribers(topic):
            if client.connected:
                self._deliver(client, topic, payload)

    def _deliver(self, client: MemoryTransport, topic: str, payload: bytes) -> None:
        copies = self._faults.copies() if self.interfere is None else self.interfere(client.client_id, topic, payload)
        for _ in range(copies):
            self._enqueue(client, Received(topic, payload))
            if self._faults.overtakes():
                self._swap_last(client)

    def _swap_last(self, client: MemoryTransport) -> None:
        """Exchange the delivery just queued with another one to the same client."""
        same = [
            place
            for place, (other, session, event) in enumerate(self._queue)
            if other is client and session == client.session and isinstance(event, Received)
        ]
        place = self._faults.random.choice(same)
        self._queue[place], self._queue[-1] = self._queue[-1], self._queue[place]


class _Index:
    """Who subscribes to what, found without a look at every client: with hundreds of them that look would take longest."""

    def __init__(self) -> None:
        self._exact: dict[str, set[MemoryTransport]] = {}  # topic -> clients
        self._below: dict[str, set[MemoryTransport]] = {}  # a -> clients of a/+
        self._others: dict[str, set[MemoryTransport]] = {}  # filter -> clients

    def add(self, client: MemoryTransport, filter: str) -> None:
        table, key = self._place(filter)
        table.setdefault(key, set()).add(client)

    def remove(self, client: MemoryTransport, filters: Iterable[str]) -> None:
        for filter in filters:
            table, key = self._place(filter)
            clients = table.get(key, set())
            clients.discard(client)
            if not clients:
                table.pop(key, None)

    def subscribers(self, topic: str) -> list[MemoryTransport]:
        """In the order of their opening."""
        found = self._exact.get(topic, set()) | self._below.get(topic.rpartition("/")[0], set())
        for filter, clients in self._others.items():
            if matches(filter, topic):
                found = found | clients
        return sorted(found, key=lambda client: client.number)

    def _place(self, filter: str) -> tuple[dict[str, set[MemoryTransport]], str]:
        parent, _, last = filter.rpartition("/")
        if "+" not in filter and "#" not in filter:
            return self._exact, filter
        if last == "+" and parent and "+" not in parent:
            return self._below, parent
        return self._others, filter


class MemoryTransport(Transport):
    """A client of a MemoryBroker; made by `MemoryBroker.transport`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.client_id = ""
        self.connected = False  # as the broker sees it
        self.session = 0  # grows with every connection: what belongs to an older one is lost
        self.filters: dict[str, None] = {}
        self.number = 0  # of its opening, among all transports of the broker
        self._broker = broker
        self._will: Will | None = None
        self._receive: Callable[[Event], None] | None = None
        self._pending = 0

    def open(self, client_id: str, will: Will | None, deliver: Callable[[Event], None]) -> None:
        self.client_id, self._will, self._receive = client_id, will, deliver
        self._broker._open(self)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        if self.connected:
            self.sent_bytes += publish_bytes(topic, payload, version5=True)
            self._pending += 1
            self._broker._publish(self.client_id, topic, payload, retain)
            self._broker._enqueue(self, Sent())

    def subscribe(self, filter: str) -> None:
        self.filters[filter] = None
        self._broker._subscribe(self, filter)

    def unsubscribe(self, filter: str) -> None:
        self.filters.pop(filter, None)
        self._broker._unsubscribe(self, filter)

    @property
    def pending(self) -> int:
        return self._pending

    def reconnect(self) -> None:
        if self.connected:
            self._broker.cut(self.client_id, reconnect=self.client_id not in self._broker._kept_out)

    def close(self) -> None:
        self.connected, self._receive, self._pending = False, None, 0
        self._broker._close(self)

    def _begin(self) -> None:
        self.connected = True
        self.session += 1

    def _lose(self, reason: TransportError, send_will: bool) -> None:
        if self.connected:
            self.connected, self._pending = False, 0
            self.session += 1
            self._broker._enqueue(self, Disconnected(reason))
            if send_will and self._will is not None:
                self._broker._publish(self.client_id, self._will.topic, self._will.payload, True)

    def _take(self, session: int, event: Event) -> bool:
        """Hand an event over, unless it belongs to a connection that is gone."""
        if self._receive is None or (session != self.session and not isinstance(event, Disconnected)):
            return False
        match event:
            case Sent():
                self._pending -= 1
            case Received(topic, payload):
                self.received_bytes += publish_bytes(topic, payload, version5=True)
        self._receive(event)
        return True
