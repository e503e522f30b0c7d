"""MQTT 5, or 3.1.1 where a broker knows nothing newer, with reconnection for as long as it is open.

One thread makes one `Session` after another; between two it waits 0.5 s to 60 s, doubling, with jitter, but 2 s at most where
the link breaks often and carries something in between. The first session is a
probe in MQTT 5 without our will, because a will in MQTT 5 leaves some older brokers waiting for the rest of the packet
for ever. A broker that refuses the version, or does not answer, is asked again at once in 3.1.1, which is remembered.
Sessions are clean: what was under way when a connection broke is lost, and the machines above repeat what matters.

Bytes counted are those of PUBLISH packets, in both directions: fixed header, topic, packet id, property length, payload.
Sent ones count when they are handed to the connection. Acknowledgements (4 bytes), CONNECT, SUBSCRIBE and pings do not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from random import Random

from lwfed.errors import TransportError, Unreachable
from lwfed.transport.address import BrokerAddress, Credentials, TlsFiles
from lwfed.transport.base import Connected, Disconnected, Event, Received, Sent, Transport, Will
from lwfed.transport.mqtt_session import Session, Settings
from lwfed.transport.packets import publish_bytes

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 60.0
STABLE_S = 10.0  # a session this long starts the delays anew; shorter ones would hammer a broker that throws us out
USEFUL = 8  # messages that a session carried: after so many the next one comes soon
USEFUL_DELAY_S = 2.0  # at most
SUSPICIOUS = 3  # so many short sessions in a row
CLOSE_S = 5.0


class MqttTransport(Transport):
    def __init__(
        self,
        address: BrokerAddress,
        credentials: Credentials = Credentials(),  # noqa: B008 - frozen
        tls: TlsFiles | None = None,
        *,
        window: int = 20,
        keepalive_s: int = 60,
    ) -> None:
        """Raises ConfigError for unusable files of TLS."""
        self._address = address
        self._credentials = credentials
        self._context = (tls or TlsFiles()).context() if address.tls else None
        self._window = window
        self._keepalive_s = keepalive_s
        self._filters: dict[str, None] = {}
        self._version5 = True
        self._known = False  # whether the broker has let us in with this version
        self._session: Session | None = None
        self._admitted = False  # it may subscribe: the broker has accepted us
        self._up = False  # and may publish: all subscriptions are confirmed
        self._early: list[Received] = []  # came before the last SUBACK
        self._pending = 0
        self._pauses = _Pauses()
        self._changed = threading.Condition()  # guards all of the above
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._deliver: Callable[[Event], None] = lambda event: None

    @property
    def protocol(self) -> str:
        """The version of MQTT in use."""
        return "5" if self._version5 else "3.1.1"

    def open(self, client_id: str, will: Will | None, deliver: Callable[[Event], None]) -> None:
        settings = Settings(self._address, self._credentials, self._context, client_id, will, self._keepalive_s, self._window)
        self._deliver = deliver
        self._thread = threading.Thread(target=self._run, args=(settings,), name=f"mqtt-{client_id}", daemon=True)
        self._thread.start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Raises TransportError for a message larger than the broker accepts: it would end the connection every time."""
        with self._changed:
            session = self._session
            if session is None or not self._up:
                return
            size = publish_bytes(topic, payload, session.version5)
            if self.packet_limit is not None and size > self.packet_limit:
                raise TransportError(
                    f"a message of {size} bytes; {self._address} accepts {self.packet_limit}: raise its maximum packet size"
                )
            self._pending += 1
            self.published += 1
            self.sent_bytes += size
        if not session.publish(topic, payload, retain):
            self._subtract_pending(session)

    def subscribe(self, filter: str) -> None:
        with self._changed:
            self._filters[filter] = None
            session = self._session if self._admitted else None
        if session is not None:
            session.subscribe(filter)

    def unsubscribe(self, filter: str) -> None:
        with self._changed:
            self._filters.pop(filter, None)
            session = self._session if self._admitted else None
        if session is not None:
            session.unsubscribe(filter)

    @property
    def pending(self) -> int:
        return self._pending

    def reconnect(self) -> None:
        with self._changed:
            session = self._session
        if session is not None:
            session.drop(Unreachable(f"the connection to {self._address} was given up"))

    def close(self) -> None:
        if self._thread is None or self._closing.is_set():
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._up or self._pending == 0, timeout=CLOSE_S)
            self._closing.set()
            session = self._session
        if session is not None:
            session.leave()
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_S)

    # What a session tells, on our thread.

    def filters_now(self, session: Session) -> list[str]:
        with self._changed:
            self._admitted = True
            self.packet_limit = session.packet_limit
            return list(self._filters)

    def on_up(self) -> None:
        with self._changed:
            self._up = True
            early, self._early = self._early, []
        self._tell(Connected())
        for event in early:
            self._tell(event)

    def on_received(self, event: Received) -> None:
        self.received_bytes += publish_bytes(event.topic, event.payload, self._version5)
        if self._up:
            self._tell(event)
        else:
            self._early.append(event)

    def on_sent(self) -> None:
        with self._changed:
            session = self._session
        if session is not None:
            self._subtract_pending(session)
            self._tell(Sent())

    def _run(self, settings: Settings) -> None:
        while (session := self._next_session(settings)) is not None:
            self._closing.wait(self._after(session, session.run()))

    def _next_session(self, settings: Settings) -> Session | None:
        """None once we are closed."""
        settings = replace(settings, window=self._window)
        session = self._make_session(settings, self._version5, probe=self._version5 and not self._known)
        with self._changed:
            if self._closing.is_set():
                return None
            self._session = session
        return session

    def _make_session(self, settings: Settings, version5: bool, probe: bool) -> Session:
        return Session(settings, version5, self, probe)

    def _after(self, session: Session, reason: TransportError) -> float:
        """The session has ended for this `reason`: seconds until there is to be another one."""
        with self._changed:
            self._session, self._admitted, self._up, self._early, self._pending = None, False, False, [], 0
            self._changed.notify_all()
        if self._negotiated(session):
            self._window = session.window
            return 0.0
        self._pauses.note(session)
        if self._pauses.short_sessions >= SUSPICIOUS:  # few brokers say it themselves
            client_id = session.settings.client_id
            hint = f"if another program connects as {client_id!r}, give each one a --name of its own"
            reason = type(reason)(f"{reason}; again and again: {hint}")
        self._tell(Disconnected(reason))
        return self._pauses.following()

    def _negotiated(self, session: Session) -> bool:
        """Learn for the next attempt; whether that is to be made at once, on the broker's terms."""
        news = session.welcome and session.version5 and not self._known
        if session.wrong_version or (session.hung_up and not self._known):
            self._version5 = not self._version5
            news = session.version5
        self._known = session.welcome or (self._known and not session.hung_up and not session.wrong_version)
        return news or session.window < self._window

    def _subtract_pending(self, session: Session) -> None:
        with self._changed:
            if session is self._session and self._pending:
                self._pending -= 1
                self._changed.notify_all()

    def _tell(self, event: Event) -> None:
        if not self._closing.is_set():
            self._deliver(event)


class _Pauses:
    """How long to wait between two attempts."""

    def __init__(self) -> None:
        self.short_sessions = 0  # in a row
        self._delay_s = FIRST_DELAY_S
        self._random = Random()

    def note(self, session: Session) -> None:
        if session.up_since is None:
            return
        stable = time.monotonic() - session.up_since >= STABLE_S
        self.short_sessions = 0 if stable else self.short_sessions + 1
        if stable:
            self._delay_s = FIRST_DELAY_S
        elif session.carried >= USEFUL:
            self._delay_s = min(self._delay_s, USEFUL_DELAY_S)

    def following(self) -> float:
        delay_s = self._delay_s * self._random.uniform(0.75, 1.25)
        self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S)
        return delay_s
