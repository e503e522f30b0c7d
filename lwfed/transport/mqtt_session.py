"""One connection to a broker over paho-mqtt, from CONNECT to its end.

paho's client is used for a single connection and thrown away: what it would send again after a reconnection (messages
that were under way, even one that the broker refuses for its size, for ever) is dropped with it. Everything of paho runs
on the thread that calls `run`; only `publish`, `subscribe`, `unsubscribe`, `drop` and `leave` are called from elsewhere.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, cast

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from lwfed.errors import Forbidden, TransportError, Unreachable
from lwfed.transport.address import BrokerAddress, Credentials
from lwfed.transport.base import Received, Will
from lwfed.transport.mqtt_errors import UNSUPPORTED_VERSION, explain_disconnect, explain_failure, explain_refusal, hangs_up

CONNECT_TIMEOUT_S = 10.0
LEAVE_S = 2.0
MAX_QUEUED = 10_000  # messages within paho: chunks, manifests and tasks wait outside for room, answers to a whole fleet do not


@dataclass(frozen=True)
class Settings:
    address: BrokerAddress
    credentials: Credentials
    context: ssl.SSLContext | None
    client_id: str
    will: Will | None
    keepalive_s: int
    window: int


class Owner(Protocol):
    """Whom a session tells what happens, always on the thread of `run`."""

    def filters_now(self, session: Session) -> list[str]: ...
    def on_up(self) -> None: ...
    def on_received(self, event: Received) -> None: ...
    def on_sent(self) -> None: ...


class _Tls:
    """A context of TLS that knows its socket: paho leaves it open when the handshake fails."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.check_hostname = context.check_hostname
        self._context = context
        self._socket: ssl.SSLSocket | None = None

    def wrap_socket(self, sock: socket.socket, **options: Any) -> ssl.SSLSocket:
        self._socket = self._context.wrap_socket(sock, **options)
        return self._socket

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


class Session:
    """With `probe` it only finds out what the broker speaks, and leaves."""

    def __init__(self, settings: Settings, version5: bool, owner: Owner, probe: bool = False) -> None:
        self.version5 = version5
        self.packet_limit: int | None = None
        self.window = settings.window  # that the broker allows
        self.wrong_version = False  # the broker does not know this version of MQTT
        self.hung_up = False  # it did not answer CONNECT
        self.welcome = False  # it did, and lets us in
        self.up_since: float | None = None
        self.carried = 0  # messages that came, but for retained ones, or that the broker has confirmed
        self.settings = settings
        self._owner = owner
        self._reason: TransportError | None = None
        self._answered = False
        self._leave_by: float | None = None
        self._probe = probe
        self._tls: _Tls | None = None
        self._unconfirmed: set[int] = set()  # subscriptions without a SUBACK
        self._client = self._make_client()

    def run(self) -> TransportError:
        """Connect and stay until the connection ends; returns why."""
        address = self.settings.address
        try:
            self._client.connect(address.host, address.port, self.settings.keepalive_s)
        except (OSError, ValueError) as error:
            self.drop(explain_failure(error, address, CONNECT_TIMEOUT_S))
            if self._tls is not None:
                self._tls.close()
        try:
            self._loop()
        except Exception as error:  # whatever a socket, a codec or TLS raises within paho
            self.drop(Unreachable(f"the connection to {address} broke: {error!r}"))
        finally:
            self._release()
        return self.reason

    @property
    def reason(self) -> TransportError:
        """Why it has ended."""
        return self._reason or Unreachable(f"the connection to {self.settings.address} ended")

    def publish(self, topic: str, payload: bytes, retain: bool) -> bool:
        """Whether paho took it."""
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        return info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS

    def subscribe(self, filter: str) -> int | None:
        """The number of the packet, unless the connection is gone."""
        if self.version5:
            return self._client.subscribe(filter, options=SubscribeOptions(qos=1, retainAsPublished=True))[1]
        return self._client.subscribe(filter, qos=1)[1]

    def unsubscribe(self, filter: str) -> None:
        self._client.unsubscribe(filter)

    def drop(self, reason: TransportError) -> None:
        """End the connection without a farewell: the broker sends our will."""
        self._reason = self._reason or reason
        sock: Any = self._client.socket()
        if sock is not None:
            with suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # wakes the loop; that of TLS would spoil its state under it

    def leave(self) -> None:
        """Say DISCONNECT, so that the broker forgets our will; ends `run`."""
        if self.up_since is None:
            self.drop(Unreachable(f"closed before {self.settings.address} answered"))
        else:
            self._leave_by = time.monotonic() + LEAVE_S
            self._client.disconnect()

    def _loop(self) -> None:
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while self._reason is None and self._client.loop(timeout=1.0) == MQTTErrorCode.MQTT_ERR_SUCCESS:
            if self.up_since is None and time.monotonic() > deadline:
                self.hung_up = not self._answered
                self.drop(explain_failure(TimeoutError(), self.settings.address, CONNECT_TIMEOUT_S))
            if self._leave_by is not None and time.monotonic() > self._leave_by:
                self.drop(Unreachable(f"{self.settings.address} does not take a farewell"))

    def _release(self) -> None:
        sock = self._client.socket()
        if sock is not None:
            sock.close()
        # They refer to us and we to the client: without the circle its sockets are closed now and not some day.
        self._client.on_connect = self._client.on_subscribe = self._client.on_publish = None
        self._client.on_message = self._client.on_disconnect = None

    def _make_client(self) -> paho.Client:
        settings = self.settings
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            protocol=MQTTProtocolVersion.MQTTv5 if self.version5 else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.max_inflight_messages_set(settings.window)
        client.max_queued_messages_set(MAX_QUEUED)
        if settings.credentials.username is not None:
            client.username_pw_set(settings.credentials.username, settings.credentials.password)
        if settings.context is not None:
            self._tls = _Tls(settings.context)
            client.tls_set_context(cast(ssl.SSLContext, self._tls))
        if settings.will is not None and not self._probe:
            client.will_set(settings.will.topic, settings.will.payload, qos=1, retain=True)
        client.on_connect = self._guarded(self._on_connect)
        client.on_subscribe = self._guarded(self._on_subscribe)
        client.on_publish = self._guarded(self._on_publish)
        client.on_message = self._guarded(self._on_message)
        client.on_disconnect = self._guarded(self._on_disconnect)
        # Its presence keeps paho from writing to the socket on the thread that publishes; the loop is woken anyway.
        client.on_socket_register_write = lambda client, userdata, sock: None
        return client

    def _guarded(self, callback: Callable[..., None]) -> Callable[..., None]:
        """An exception within a callback would end the thread and leave paho claiming to be connected."""

        def call(*arguments: Any) -> None:
            try:
                callback(*arguments)
            except Exception as error:
                self.drop(TransportError(f"cannot handle what {self.settings.address} sent: {error!r}"))

        return call

    def _on_connect(self, client: paho.Client, _u: Any, _f: Any, reason: ReasonCode, properties: Properties | None) -> None:
        self._answered = True
        if reason.is_failure:
            self.wrong_version = self.version5 and reason.value == UNSUPPORTED_VERSION
            self._reason = explain_refusal(reason, self.settings.address, self.settings.client_id)
            return
        self.welcome = True
        self.packet_limit = getattr(properties, "MaximumPacketSize", None)
        self.window = min(self.settings.window, getattr(properties, "ReceiveMaximum", self.settings.window))
        if self.window < self.settings.window and not self._probe:  # which paho neither heeds nor lets us set now
            self.drop(Unreachable(f"{self.settings.address} takes {self.window} messages at a time: connecting again"))
            return
        if self._probe:
            client.disconnect()
            return
        for filter in self._owner.filters_now(self):
            if (number := self.subscribe(filter)) is not None:
                self._unconfirmed.add(number)
        self._when_subscribed()

    def _on_subscribe(self, _c: Any, _u: Any, number: int, reasons: list[ReasonCode], _p: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            name = self.settings.credentials.username or self.settings.client_id
            self.drop(Forbidden(f"{self.settings.address} does not let {name!r} subscribe: check the permissions of that user"))
            return
        self._unconfirmed.discard(number)
        self._when_subscribed()

    def _when_subscribed(self) -> None:
        if not self._unconfirmed and self.up_since is None:
            self.up_since = time.monotonic()
            self._owner.on_up()

    def _on_publish(self, _c: Any, _u: Any, _number: int, reason: ReasonCode, _p: Any) -> None:
        if reason.is_failure:
            self.drop(Forbidden(f"{self.settings.address} does not let us publish ({reason}): check the permissions of our user"))
        else:
            self.carried += 1
            self._owner.on_sent()

    def _on_message(self, _c: Any, _u: Any, message: paho.MQTTMessage) -> None:
        self.carried += not message.retain
        self._owner.on_received(Received(message.topic, bytes(message.payload), bool(message.retain)))

    def _on_disconnect(self, _c: Any, _u: Any, flags: paho.DisconnectFlags, reason: ReasonCode, _p: Any) -> None:
        address = self.settings.address
        if self._reason is None and not self._answered:
            self.hung_up = True
            self.drop(hangs_up(address))
        self.drop(explain_disconnect(reason, flags.is_disconnect_packet_from_server, address, self.settings.client_id))
