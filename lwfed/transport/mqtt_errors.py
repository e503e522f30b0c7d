"""Why there is no session, in words that say what to check."""

from __future__ import annotations

import socket
import ssl

from paho.mqtt.reasoncodes import ReasonCode

from lwfed.errors import Refused, TransportError, Unreachable, Untrusted
from lwfed.transport.address import BrokerAddress

# Reason codes are those of MQTT 5, section 2.4; paho translates those of 3.1.1.
UNSPECIFIED = 0x80  # what paho makes of a socket that was closed
UNSUPPORTED_VERSION = 0x84
AT_ANOTHER_TIME = (9, 10)  # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
NAME_AUTHORITY = "name its authority with --ca"
_CREDENTIALS = "check --username and --password-file (or LWFED_MQTT_PASSWORD)"


def explain_failure(error: Exception, address: BrokerAddress, timeout_s: float) -> TransportError:
    """An attempt to connect that ended before MQTT began."""
    match error:
        case socket.gaierror() | UnicodeError():
            return Unreachable(f"cannot find the host {address.host!r}: check its name and this machine's network (DNS)")
        case ssl.SSLCertVerificationError(verify_code=code) if code in AT_ANOTHER_TIME:  # a machine without a clock has none until NTP
            return Unreachable(f"the certificate of {address} is not valid by this machine's clock ({error}): is the clock right?")
        case ssl.SSLCertVerificationError():
            return Untrusted(f"the certificate of {address} is not trusted ({error}): {NAME_AUTHORITY}")
        case ConnectionResetError() | BrokenPipeError() | ssl.SSLEOFError():
            return hangs_up(address)
        case ssl.SSLError():
            return Unreachable(f"no TLS with {address} ({error}): is this its TLS port? Use mqtt:// without TLS")
        case ConnectionRefusedError():
            return Unreachable(f"nothing listens at {address}: is the broker running, and is the port right?")
        case TimeoutError():
            return Unreachable(f"no answer from {address} within {timeout_s:g} s: check the address, the network and firewalls")
        case OSError():
            return Unreachable(f"cannot connect to {address}: {error.strerror or error}")
    return Unreachable(f"cannot connect to {address}: {error}")


def hangs_up(address: BrokerAddress) -> Unreachable:
    with_or_without = "without TLS (mqtt://)" if address.tls else "with TLS (mqtts://)"
    return Unreachable(f"{address} hangs up on us: is it an MQTT broker, and not one {with_or_without}?")


def explain_refusal(reason: ReasonCode, address: BrokerAddress, client_id: str) -> TransportError:
    """A CONNACK that is none."""
    match reason.value:
        case 0x86:
            return Refused(f"{address} does not accept the user name or password: {_CREDENTIALS}")
        case 0x87 | 0x8C:
            return Refused(f"{address} does not let us in ({reason}): {_CREDENTIALS}")
        case 0x8A:
            return Refused(f"{address} has banned us: ask whoever runs the broker")
        case 0x85:
            return Refused(f"{address} does not accept the client id {client_id!r}: choose another --name")
    return Unreachable(f"{address} refuses the connection: {reason}; try again later or ask whoever runs the broker")


def explain_disconnect(reason: ReasonCode, from_broker: bool, address: BrokerAddress, client_id: str) -> TransportError:
    """A session that ended without our wish."""
    if from_broker:
        match reason.value:
            case 0x8E:
                return Refused(f"another program connected to {address} as {client_id!r}: give each one a --name of its own")
            case 0x95:
                return TransportError(f"a message is larger than {address} accepts: raise its maximum packet size")
            case 0x87 | 0x8A | 0x98:
                return Refused(f"{address} ended the session: {reason}; ask whoever runs the broker")
        return Unreachable(f"{address} ended the session: {reason}")
    why = "" if reason.value == UNSPECIFIED else f": {reason}"
    return Unreachable(f"the connection to {address} broke{why}")
