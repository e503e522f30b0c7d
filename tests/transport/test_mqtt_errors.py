"""Failures that no broker on this machine can be brought to."""

from __future__ import annotations

import socket
import ssl

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from lwfed.errors import Refused, TransportError, Unreachable, Untrusted
from lwfed.transport.address import BrokerAddress
from lwfed.transport.mqtt_errors import explain_disconnect, explain_failure, explain_refusal

ADDRESS = BrokerAddress("broker.example", 8883, tls=True)


def at_another_time(code: int, text: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, f"certificate verify failed: certificate is {text}")
    error.verify_code = code
    return error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (socket.gaierror(-2, "Name or service not known"), Unreachable, "'broker.example': check its name"),
        (ConnectionRefusedError(), Unreachable, "nothing listens at mqtts://broker.example:8883"),
        (TimeoutError(), Unreachable, "within 10 s: check the address"),
        (ConnectionResetError(), Unreachable, "hangs up on us"),
        (ssl.SSLCertVerificationError(), Untrusted, "--ca"),
        (at_another_time(9, "not yet valid"), Unreachable, "is the clock right?"),  # passes when a machine without one has asked for it
        (at_another_time(10, "expired"), Unreachable, "is the clock right?"),
        (ssl.SSLError(1, "wrong version number"), Unreachable, "mqtt:// without TLS"),
        (OSError(101, "Network is unreachable"), Unreachable, "Network is unreachable"),
        (ValueError("strange"), Unreachable, "strange"),
    ],
)
def test_an_attempt_that_fails(error, kind, text):
    reason = explain_failure(error, ADDRESS, 10.0)
    assert type(reason) is kind
    assert text in str(reason)


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("Bad user name or password", Refused, "--password-file"),
        ("Not authorized", Refused, "--username"),
        ("Banned", Refused, "banned"),
        ("Client identifier not valid", Refused, "--name"),
        ("Server unavailable", Unreachable, "try again later"),
        ("Quota exceeded", Unreachable, "Quota exceeded"),
    ],
)
def test_a_refused_connect(name, kind, text):
    reason = explain_refusal(ReasonCode(PacketTypes.CONNACK, name), ADDRESS, "device-1")
    assert type(reason) is kind
    assert text in str(reason)


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("Session taken over", Refused, "'device-1': give each one a --name"),
        ("Packet too large", TransportError, "maximum packet size"),
        ("Not authorized", Refused, "Not authorized"),
        ("Server shutting down", Unreachable, "Server shutting down"),
    ],
)
def test_a_farewell_of_the_broker(name, kind, text):
    reason = explain_disconnect(ReasonCode(PacketTypes.DISCONNECT, name), True, ADDRESS, "device-1")
    assert type(reason) is kind
    assert text in str(reason)
