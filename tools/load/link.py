"""The transport of real devices for many on one thread: a selector where each has a thread of its own otherwise."""

from __future__ import annotations

import selectors
import time
from collections.abc import Callable
from typing import Any

from paho.mqtt.enums import MQTTErrorCode

from lwfed.transport.address import BrokerAddress, Credentials
from lwfed.transport.base import Event, Will
from lwfed.transport.mqtt import MqttTransport
from lwfed.transport.mqtt_errors import explain_failure
from lwfed.transport.mqtt_session import CONNECT_TIMEOUT_S, Owner, Session, Settings

CLOSE_S = 5.0
LOOK_EVERY_S = 1.0  # at time-outs and keep-alives
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class PolledSession(Session):
    """Does a step when its socket is ready, instead of `run`."""

    def __init__(self, settings: Settings, version5: bool, owner: Owner, probe: bool, selector: selectors.BaseSelector) -> None:
        super().__init__(settings, version5, owner, probe)
        self.ended = False
        self._selector = selector
        self._client.on_socket_open = _heed(lambda sock: selector.register(sock, READ, owner))
        self._client.on_socket_close = _heed(selector.unregister)
        self._client.on_socket_register_write = _heed(lambda sock: selector.modify(sock, READ | WRITE, owner))
        self._client.on_socket_unregister_write = _heed(lambda sock: selector.modify(sock, READ, owner))

    def begin(self) -> None:
        """Connect; that waits only for a broker of this machine to take the connection."""
        self._deadline = time.monotonic() + CONNECT_TIMEOUT_S
        address = self.settings.address
        try:
            self._client.connect(address.host, address.port, self.settings.keepalive_s)
        except OSError as error:
            self.drop(explain_failure(error, address, CONNECT_TIMEOUT_S))
            self.ended = True

    def step(self, ready: int) -> None:
        if ready & READ:
            self._note(self._client.loop_read())
        if ready & WRITE and not self.ended:
            self._note(self._client.loop_write())

    def look(self) -> None:
        """What time alone asks for."""
        self._note(self._client.loop_misc())
        if self.up_since is None and not self.ended and time.monotonic() > self._deadline:
            self.hung_up = not self._answered
            self.drop(explain_failure(TimeoutError(), self.settings.address, CONNECT_TIMEOUT_S))
            self.ended = True

    def release(self) -> None:
        sock: Any = self._client.socket()
        if sock is not None:
            self._selector.unregister(sock)
        self._client.on_socket_open = self._client.on_socket_close = None  # which paho calls once more for a closed socket
        self._client.on_socket_register_write = self._client.on_socket_unregister_write = None
        self._release()

    def _note(self, result: MQTTErrorCode) -> None:
        self.ended = self.ended or self._reason is not None or result != MQTTErrorCode.MQTT_ERR_SUCCESS


def _heed(act: Callable[[Any], object]) -> Callable[[Any, Any, Any], None]:
    """A callback of paho that is about a socket."""

    def call(client: Any, userdata: Any, sock: Any) -> None:
        act(sock)

    return call


class PolledTransport(MqttTransport):
    """One of `connections`, whose thread alone may use it. TLS, of which paho reads ahead, is left out."""

    def __init__(self, connections: Connections, address: BrokerAddress) -> None:
        super().__init__(address)
        self._connections = connections

    def open(self, client_id: str, will: Will | None, deliver: Callable[[Event], None]) -> None:
        self._deliver = deliver
        self._wanted = Settings(self._address, Credentials(), None, client_id, will, self._keepalive_s, self._window)
        self._connections.begin(self, time.monotonic())

    def begin(self) -> None:
        self._do(PolledSession.begin, self._next_session(self._wanted))

    def step(self, ready: int) -> None:
        self._do(lambda session: session.step(ready), self._session)

    def look(self) -> None:
        self._do(PolledSession.look, self._session)

    def close(self) -> None:
        until = time.monotonic() + CLOSE_S
        while self._up and self._pending and time.monotonic() < until:
            self._connections.poll(LOOK_EVERY_S)
        self._closing.set()
        if self._session is not None:
            self._session.leave()

    def _do(self, something: Callable[[PolledSession], None], session: Session | None) -> None:
        if isinstance(session, PolledSession):
            something(session)
            if session.ended:
                session.release()
                self._connections.begin(self, time.monotonic() + self._after(session, session.reason))

    def _make_session(self, settings: Settings, version5: bool, probe: bool) -> Session:
        return PolledSession(settings, version5, self, probe, self._connections.selector)


class Connections:
    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self._begins: dict[PolledTransport, float] = {}  # of those without a session
        self._look_at = time.monotonic()

    def begin(self, transport: PolledTransport, when: float) -> None:
        """Let it connect at that time."""
        self._begins[transport] = when

    def poll(self, timeout_s: float) -> None:
        """Wait, at most so long, until there is something to read or write, and do it."""
        due = min([self._look_at, *self._begins.values()]) - time.monotonic()
        for key, ready in self.selector.select(max(0.0, min(timeout_s, due))):
            key.data.step(ready)
        now = time.monotonic()
        for transport in [one for one, when in self._begins.items() if when <= now]:
            del self._begins[transport]
            transport.begin()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            for key in list(self.selector.get_map().values()):
                key.data.look()

    def close(self) -> None:
        """Send what is pending and say goodbye to the broker, everywhere."""
        for transport in {key.data for key in self.selector.get_map().values()}:
            transport.close()
        until = time.monotonic() + CLOSE_S
        while self.selector.get_map() and time.monotonic() < until:
            self.poll(LOOK_EVERY_S)
        self.selector.close()
