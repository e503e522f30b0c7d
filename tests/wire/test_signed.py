import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lwfed.errors import InvalidMessage
from lwfed.wire.signed import sign, unverified, verified

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
ANNOUNCEMENT = b'{"v":1,"run":"demo"}'
SIGNED = sign(ANNOUNCEMENT, "default", KEY)


def test_an_announcement_is_signed_as_ever():
    assert SIGNED == ANNOUNCEMENT + b"\n" + b"ZaTz+HExFXeVg//tRt3+todgiVkbPhWhdZUBCUr4kTuFYnQurcxue1WApPCKO9sHALdAgcrnOBXW/R9LvaKOBg=="


def test_what_was_signed_is_believed_and_can_be_read_without_the_key():
    assert verified(SIGNED, "default", PUBLIC) == unverified(SIGNED) == unverified(ANNOUNCEMENT) == ANNOUNCEMENT


@pytest.mark.parametrize("place", range(len(SIGNED)))
def test_an_announcement_with_any_other_byte_is_refused(place):
    changed = bytearray(SIGNED)
    changed[place] ^= 4
    with pytest.raises(InvalidMessage, match="not signed"):
        verified(bytes(changed), "default", PUBLIC)


@pytest.mark.parametrize(
    "payload",
    [
        ANNOUNCEMENT,
        ANNOUNCEMENT + b"\n",
        sign(ANNOUNCEMENT, "other", KEY),
        sign(ANNOUNCEMENT, "default", Ed25519PrivateKey.generate()),
        SIGNED + b"\n" + base64.b64encode(bytes(64)),
        SIGNED[:-4],
        SIGNED + b"AAAA",
    ],
    ids=["unsigned", "empty", "another fleet", "another key", "two signatures", "short", "long"],
)
def test_what_the_server_did_not_sign_for_this_fleet_is_refused(payload):
    with pytest.raises(InvalidMessage, match="not signed"):
        verified(payload, "default", PUBLIC)
