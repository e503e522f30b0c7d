"""A broker in this process, for simulations and tests: deterministic, without threads, sockets or a clock.

It behaves as brokers do, at their worst where a fault is asked for: clean sessions, at least once, retained messages,
wills, wildcards; a publisher's acknowledgement says nothing about delivery. Nothing is delivered but by `pump`, and
what a fault delays not before its time, by the clock that the broker was given.
Not thread-safe: everything happens on the thread that pumps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from random import Random

from lwfed.errors import TransportError, Unreachable
from lwfed.transport.base import Connected, Disconnected, Event, Received, Sent, Transport, Will
from lwfed.transport.packets import matches, publish_bytes
from lwfed.transport.subscriptions import Subscriptions

LOG_LENGTH = 10_000


class Faults:
    """Chances, per delivery of a message to a subscriber, of being lost, doubled or overtaken; drawn from `seed`.

    Each delivery takes up to `delay_s`, and what is delayed for less overtakes it.
    """

    def __init__(self, seed: int = 0, drop: float = 0.0, duplicate: float = 0.0, reorder: float = 0.0, delay_s: float = 0.0) -> None:
        self._drop = drop
        self._duplicate = duplicate
        self._reorder = reorder
        self._delay_s = delay_s
        self.random = Random(seed)

    def copies(self) -> int:
        if self.random.random() < self._drop:
            return 0
        return 2 if self.random.random() < self._duplicate else 1

    def overtakes(self) -> bool:
        return self.random.random() < self._reorder

    def delay_s(self) -> float:
        return self.random.uniform(0.0, self._delay_s) if self._delay_s else 0.0


class MemoryBroker:
    """Routes messages between its transports. `interfere(client, topic, payload)` may say how many copies arrive.

    `faults` may be replaced at any time; only those that delay need a `clock`.
    """

    def __init__(self, faults: Faults | None = None, log_length: int = LOG_LENGTH, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.retained: dict[str, bytes] = {}
        self.log: deque[tuple[str, str, bytes]] = deque(maxlen=log_length)  # client, topic, payload of what was published
        self.interfere: Callable[[str, str, bytes], int] | None = None
        self.faults = faults or Faults()
        self._clock = clock
        self._clients: dict[str, MemoryTransport] = {}  # all that are open, connected or not
        self._opened = 0  # transports so far; messages go to subscribers in the order in which they were opened
        self._index: Subscriptions[MemoryTransport] = Subscriptions()
        self._kept_out: set[str] = set()
        self._running = True
        self._queue: deque[tuple[MemoryTransport, int, Event]] = deque()
        self._late: list[tuple[float, int, tuple[MemoryTransport, int, Event]]] = []  # a heap, by time and number
        self._delayed = 0  # deliveries so far
        self._stalled: dict[MemoryTransport, list[Callable[[], None]]] = {}  # client -> what is held up
        self._drowned: set[MemoryTransport] = set()

    def transport(self) -> MemoryTransport:
        return MemoryTransport(self)

    def pump(self, limit: int | None = None) -> int:
        """Deliver what is queued and what that causes, until nothing is left or `limit` is reached; returns how many."""
        while self._late and self._late[0][0] <= self._clock():
            self._queue.append(heappop(self._late)[2])
        count = 0
        while self._queue and count != limit:
            transport, session, event = self._queue.popleft()
            if transport in self._stalled and not isinstance(event, Disconnected):
                self._stalled[transport].append(partial(self._queue.append, (transport, session, event)))
            else:
                count += transport._take(session, event)
        return count

    @property
    def next_delivery(self) -> float | None:
        """When something that is delayed is due; None: nothing is."""
        return self._late[0][0] if self._late else None

    def cut(self, client_id: str, reconnect: bool = True, will: bool = True) -> None:
        """Break a connection as a power cut does: what is under way to it is lost, its will is published.

        With `reconnect` it is back at the next pump, else after `restore`.
        """
        client = self._clients[client_id]
        if not reconnect:
            self._kept_out.add(client_id)
        client._lose(Unreachable("the connection was cut"), send_will=will)
        self._admit(client)

    def stall(self, client_id: str) -> None:
        """Let nothing pass between client and broker, which neither of them notices, until `resume`; a `cut` before that loses it all."""
        client = self._clients[client_id]
        if client.connected:
            self._stalled.setdefault(client, [])

    def resume(self, client_id: str) -> None:
        for held in self._stalled.pop(self._clients[client_id], []):
            held()

    def drown(self, client_id: str) -> None:
        """Drop all that goes to a client, acknowledgements too, until it connects anew: mosquitto does so when its queue was full."""
        self._drowned.add(self._clients[client_id])

    def restore(self, client_id: str) -> None:
        self._kept_out.discard(client_id)
        if client_id in self._clients:
            self._admit(self._clients[client_id])

    def stop(self, persistent: bool = False) -> None:
        """The broker dies: all connections break, no will is published, and unless it is `persistent` retained messages are gone."""
        self._running = False
        if not persistent:
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
                self._deliver(client, Received(topic, payload, retained=True))

    def _take_over(self, client: MemoryTransport, topic: str, payload: bytes, retain: bool) -> None:
        if client in self._stalled:
            self._stalled[client].append(partial(self._take_over, client, topic, payload, retain))
            return
        self._publish(client.client_id, topic, payload, retain)
        if client not in self._drowned:
            self._enqueue(client, Sent())

    def _publish(self, client_id: str, topic: str, payload: bytes, retain: bool) -> None:
        self.log.append((client_id, topic, payload))
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        for client in self._index.of(topic):
            if client.connected:
                self._deliver(client, Received(topic, payload, retain))

    def _deliver(self, client: MemoryTransport, event: Received) -> None:
        interfere = self.interfere
        if client in self._drowned:
            return
        copies = self.faults.copies() if interfere is None else interfere(client.client_id, event.topic, event.payload)
        for _ in range(copies):
            if delay_s := self.faults.delay_s():
                self._delayed += 1
                heappush(self._late, (self._clock() + delay_s, self._delayed, (client, client.session, event)))
                continue
            self._enqueue(client, event)
            if self.faults.overtakes():
                self._swap_last(client)

    def _swap_last(self, client: MemoryTransport) -> None:
        """Exchange the delivery just queued with another one to the same client."""
        same = [
            place
            for place, (other, session, event) in enumerate(self._queue)
            if other is client and session == client.session and isinstance(event, Received)
        ]
        place = self.faults.random.choice(same)
        self._queue[place], self._queue[-1] = self._queue[-1], self._queue[place]


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
            self.published += 1
            self._broker._take_over(self, topic, payload, retain)

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
        self._broker._stalled.pop(self, None)
        self._broker._drowned.discard(self)
        self._broker._close(self)

    def vanish(self) -> None:
        """Close as a process does that dies: the will is sent."""
        self._lose(Unreachable("its process is gone"), send_will=True)
        self.close()

    def _begin(self) -> None:
        self.connected = True
        self.session += 1

    def _lose(self, reason: TransportError, send_will: bool) -> None:
        if self.connected:
            self.connected, self._pending = False, 0
            self._broker._stalled.pop(self, None)
            self._broker._drowned.discard(self)
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
