"""How a device gets its identity, by token.

Key and signing request are on disk before the token is sent, so that the same command may be given again after a power
cut or a lost answer: the server certifies the same request again. Nothing is sent to a server that does not prove to be
of the authority in the token. The certificate is of use only when `identity.json` is there, which is written last.
"""

from __future__ import annotations

import queue
import time
import warnings
from pathlib import Path

from lwfed.edge_agent.agent import JOURNAL
from lwfed.edge_agent.identity import AUTHORITY, FOLDER, Identity, load
from lwfed.errors import ConfigError, InvalidMessage, ProtocolMismatch, Refused, StateError, TransportError, Unreachable, Untrusted
from lwfed.private import write_private
from lwfed.transport.address import BrokerAddress, Credentials, TlsFiles
from lwfed.transport.base import Connected, Disconnected, Event, Received, Transport
from lwfed.transport.mqtt import MqttTransport
from lwfed.wire.enrolment import Admission, Enrol
from lwfed.wire.messages import decode, encode
from lwfed.wire.token import Token, digest
from lwfed.wire.topics import Topics

REFUSED_S = 3.0  # the broker hears of a token a second after it was made
AGAIN_S = 3.0  # after a request that nobody has answered: the server is down, or the broker dropped it
RENEW = "ask for a new one (`cloud-server enrol NAME` on the server)"


def enrol(token: Token, state: Path, wait_s: float) -> str:
    """Become the device that the token is for, within `wait_s`; its name. Raises ConfigError, StateError and TransportError."""
    known = load(state)
    if known is not None:
        raise StateError(f"{state} is enrolled already, as device {known.device}: use another --name or --state")
    if (state / JOURNAL).exists():
        raise StateError(f"{state} is of a device that has joined without enrolment: delete it, or use another --name or --state")
    folder = state / FOLDER
    request = signing_request(token, folder)
    admission = _ask(token, request, folder / AUTHORITY, time.monotonic() + wait_s)
    if admission.device is None or admission.certificate is None:
        raise Refused(f"the server refuses: {admission.refused}")
    write_private(folder / "certificate.pem", admission.certificate.encode())
    TlsFiles(folder / AUTHORITY, folder / "certificate.pem", folder / "key.pem").context()  # they belong together
    broker = str(BrokerAddress(token.header.host, token.header.port, tls=True))
    identity = Identity(device=admission.device, fleet=token.header.fleet, broker=broker)
    write_private(folder / "identity.json", identity.model_dump_json().encode())
    return admission.device


def signing_request(token: Token, folder: Path) -> str:
    """The signing request for this token: that of an earlier attempt, or a new one. Key and authority lie beside it.

    Raises ConfigError and StateError.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.utils import CryptographyDeprecationWarning

    path = folder / f"request-{token.header.id}.pem"
    if path.exists():
        return path.read_text()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", CryptographyDeprecationWarning)  # of what later versions refuse, as we do now
            authority = x509.load_der_x509_certificate(token.authority)
        folder.mkdir(mode=0o700, exist_ok=True)
    except (ValueError, x509.InvalidVersion, CryptographyDeprecationWarning):
        raise ConfigError(f"this token holds no certificate: {RENEW}") from None
    except OSError as error:
        raise StateError(f"cannot make {folder}: {error.strerror or error}") from None
    for other in folder.glob("request-*.pem"):  # of a key that is replaced now
        other.unlink()
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    write_private(folder / "key.pem", key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    write_private(folder / AUTHORITY, authority.public_bytes(pem))
    write_private(path, request.public_bytes(pem))
    return path.read_text()


def _ask(token: Token, request: str, authority: Path, until: float) -> Admission:
    header = token.header
    address = BrokerAddress(header.host, header.port + 1, tls=True)
    user = f"enrol.{header.id}"
    transport = MqttTransport(address, Credentials(user, digest(header.secret)), TlsFiles(authority))
    topics = Topics(header.fleet)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    transport.subscribe(topics.to_token(header.id))
    transport.open(user, None, events.put)
    try:
        question = encode(Enrol(secret=header.secret, request=request))
        return _converse(transport, events, topics.from_token(header.id), question, until)
    except Untrusted:
        text = "its certificate is of another authority or for another host, and it was told nothing"
        raise Untrusted(f"{address} is not the server of this token: {text}") from None
    except Refused:
        used = f"if somebody else used it, have that device cut off at once (`cloud-server revoke {header.device}`)"
        raise Refused(f"{address} does not accept this token: it was used, has expired or is of another server; {used}; {RENEW}") from None
    finally:
        transport.close()


def _converse(transport: Transport, events: queue.SimpleQueue[Event], topic: str, question: bytes, until: float) -> Admission:
    """Ask again and again, over lost connections, until there is an answer. Raises TransportError."""
    silence = Unreachable("the broker is there, but no server answers: is it running?")
    reason: TransportError = silence
    firm_at = time.monotonic() + REFUSED_S
    while (left_s := until - time.monotonic()) > 0:
        try:
            event = events.get(timeout=min(AGAIN_S, left_s))
        except queue.Empty:
            transport.publish(topic, question)
            continue
        match event:
            case Connected():
                reason = silence
                transport.publish(topic, question)
            case Disconnected(reason):
                if isinstance(reason, Untrusted) or (isinstance(reason, Refused) and time.monotonic() >= firm_at):
                    raise reason
            case Received(_, payload):
                try:
                    return decode(Admission, payload)
                except (InvalidMessage, ProtocolMismatch) as error:
                    raise Refused(f"the server's answer cannot be read: {error}") from None
    raise reason
