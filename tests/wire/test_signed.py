import base64

import pytest

from lwfed.cloud_server.authority import Authority
from lwfed.errors import InvalidMessage
from lwfed.wire.messages import MAX_MESSAGE_BYTES
from lwfed.wire.signed import signed, unverified, verifier

ANNOUNCEMENT = b'{"v":1,"run":"demo"}'


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def payload(authority):
    return signed(ANNOUNCEMENT, "default", authority.sign)


@pytest.fixture(scope="module")
def believe(authority):
    return verifier(authority.pem, "default")


def test_what_was_signed_is_believed_and_can_be_read_by_who_knows_no_authority(payload, believe):
    assert believe(payload) == unverified(payload) == unverified(ANNOUNCEMENT) == ANNOUNCEMENT


def test_the_longest_announcement_can_be_signed(authority, believe):
    longest = b"x" * MAX_MESSAGE_BYTES
    assert believe(signed(longest, "default", authority.sign)) == longest


@pytest.mark.parametrize("place", range(len(ANNOUNCEMENT)))
def test_an_announcement_with_another_byte_is_refused(payload, believe, place):
    for byte in range(256):
        if byte != payload[place]:
            with pytest.raises(InvalidMessage, match="not signed"):
                believe(payload[:place] + bytes([byte]) + payload[place + 1 :])


def test_what_the_server_did_not_sign_for_this_fleet_is_refused(authority, payload, believe, tmp_path):
    signature = payload.partition(b"\n")[2]
    forged = [
        ANNOUNCEMENT,
        ANNOUNCEMENT + b"\n",
        signed(ANNOUNCEMENT, "other", authority.sign),
        signed(ANNOUNCEMENT, "default", Authority(tmp_path).sign),
        ANNOUNCEMENT + b"\n" + base64.b64encode(authority.sign(ANNOUNCEMENT)),
        payload[:-4],
        payload + b"AAAA",
        payload + b"\n" + signature,
        ANNOUNCEMENT + b"\n" + b"*" * len(signature),
    ]
    for one in forged:
        with pytest.raises(InvalidMessage, match="not signed"):
            believe(one)


def test_nobody_signs_what_could_be_a_certificate(authority):
    with pytest.raises(ValueError, match="certificate"):
        authority.sign(b"\x30\x82")


def test_who_has_no_authority_to_verify_by_has_no_verifier(authority):
    with pytest.raises(ValueError, match="PEM"):
        verifier(b"nothing", "default")
