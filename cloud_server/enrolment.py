"""Letting devices enrol: a token for a person to carry to a device, and a certificate for the device that brings it."""

from __future__ import annotations

import hmac
import secrets

from lwfed.cloud_server.authority import Authority
from lwfed.cloud_server.registry import Device, Registry
from lwfed.errors import ConfigError, InvalidMessage, InvalidPayload, ProtocolMismatch, StateError
from lwfed.wire.enrolment import Admission, Enrol
from lwfed.wire.messages import decode
from lwfed.wire.token import Header, Token, digest
from lwfed.wire.topics import is_name

LIFETIME_S = 24 * 3600.0
INVALID = "this token is not valid (any more): make a new one with `cloud-server enrol`"


def invite(authority: Authority, registry: Registry, name: str) -> Token:
    """A new token for device `name`; what the device has not come with is void. Raises ConfigError and StateError."""
    if not is_name(name) or name.startswith("-"):  # which would be an option of `revoke`
        raise ConfigError(f"{name!r} is no name for a device: use 1 to 64 of a-z, 0-9 and -, and no - at the beginning")
    contact = registry.contact
    if contact is None:
        raise StateError("there is no server for devices of other machines: start one with `cloud-server serve --listen HOST`")
    token, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    registry.invite(name, token, digest(secret), LIFETIME_S)
    header = Header(host=contact.host, port=contact.port, fleet=contact.fleet, device=name, id=token, secret=secret)
    return Token(header, authority.der)


def admit(authority: Authority, registry: Registry, token: str, payload: bytes, now_s: float) -> Admission:
    """The answer to an Enrol. The same request gets the same certificate until the device has come; another one gets none."""
    try:
        asked = decode(Enrol, payload)
    except (InvalidMessage, ProtocolMismatch) as error:
        return Admission(refused=str(error)[:1000])
    device = registry.of_token(token)
    if device is None or not hmac.compare_digest(device.secret, digest(asked.secret)) or device.revoked_s is not None:
        return Admission(refused=INVALID)
    if device.certificate is not None and (device.joined_s is not None or asked.request != device.request):
        return Admission(refused=f"this token was used already: if not by you, `cloud-server revoke {device.name}` at once")
    if not device.may_enrol(now_s):
        return Admission(refused=INVALID)
    if device.certificate is not None:
        return Admission(device=device.name, certificate=device.certificate)
    return _certify(authority, registry, device, asked.request)


def _certify(authority: Authority, registry: Registry, device: Device, request: str) -> Admission:
    try:
        certificate = authority.certify(request.encode(), device.name, device.subject).decode()
        registry.certify(device.token, request, certificate)
    except InvalidPayload as error:
        return Admission(refused=str(error))
    except KeyError:
        return Admission(refused=INVALID)
    return Admission(device=device.name, certificate=certificate)
