"""Announcements that fit into the packets of the broker."""

import pytest

from lwfed.cloud_server.announcement import announced
from lwfed.cloud_server.sizes import check_announcement
from lwfed.config import load_config
from lwfed.errors import ConfigError
from lwfed.wire.messages import MAX_MESSAGE_BYTES, BlobRef, Patch, Run, decode
from lwfed.wire.signed import SIGNATURE_BYTES
from lwfed.wire.upload import PACKET_MARGIN_BYTES


def ref(number):
    return BlobRef(id=f"{number:064x}", size=300_000)


def run(layers, steps, number=1):
    parts = [f"layer.{layer}" for layer in range(1, layers + 1)]
    patches = {part: tuple(Patch(base=ref(step).id, blob=ref(step + 1)) for step in range(steps)) for part in parts if steps}
    place = {"stage": number, "stages": 12, "round": number, "rounds": 12}
    return Run(run="demo", epoch=1, seq=1, phase="training", **place, config=ref(0), parts=dict.fromkeys(parts, ref(9)), patches=patches)


def test_an_announcement_for_which_there_is_room_is_whole():
    whole = run(24, 3)
    for limit in (None, 20_480, 131_584):
        assert decode(Run, announced(whole, limit)) == whole


@pytest.mark.parametrize("limit", [12_000, 10_000, 8_000])
def test_the_oldest_patches_are_left_out_and_no_more_than_have_no_room(limit):
    whole = run(24, 3)
    message = announced(whole, limit)
    room = limit - PACKET_MARGIN_BYTES - SIGNATURE_BYTES
    assert room - 300 < len(message) <= room
    found = decode(Run, message)
    assert found.model_copy(update={"patches": whole.patches}) == whole
    lengths = {len(found.patches.get(part, ())) for part in whole.patches}
    assert max(lengths) - min(lengths) <= 1
    assert all(steps == whole.patches[part][-len(steps) :] for part, steps in found.patches.items())


def test_without_room_for_any_patch_the_parts_are_announced_alone():
    assert decode(Run, announced(run(24, 3), 3_600)) == run(24, 0)


def test_no_announcement_is_larger_than_a_message_may_be():
    assert len(announced(run(99, 8), None)) <= MAX_MESSAGE_BYTES


def test_the_limit_that_is_named_takes_the_largest_announcement():
    config = load_config("base", ["model.depth=64", "model.heads=2", "model.width=64", "transfer.chunk_bytes=1024", "train.prefix=auto"])
    with pytest.raises(ConfigError, match="announcement: the broker takes packets of 7000 bytes at most") as refusal:
        check_announcement(config, 7_000)
    needed = int(str(refusal.value).split()[-1])
    check_announcement(config, needed)
    assert len(announced(run(64, 0, 10**6), None)) + SIGNATURE_BYTES + PACKET_MARGIN_BYTES < needed
