"""The announcement as it travels: what the broker does not take would end the connection, again and again."""

from __future__ import annotations

from collections.abc import Callable

from lwfed.cloud_server.course import Course
from lwfed.transport.base import Transport
from lwfed.wire.messages import MAX_MESSAGE_BYTES, Patch, Run, encode
from lwfed.wire.records import Part
from lwfed.wire.signed import SIGNATURE_BYTES
from lwfed.wire.upload import PACKET_MARGIN_BYTES


class Announcer:
    """`sign` gives an announcement with the signature that devices want; None: they want none."""

    def __init__(self, course: Course, transport: Transport, topic: str, sign: Callable[[bytes], bytes] | None) -> None:
        self._course, self._transport, self._topic, self._sign = course, transport, topic, sign

    def publish(self) -> None:
        """Where the run stands now."""
        announcement = announced(self._course.announcement(), self._transport.packet_limit)
        self._transport.publish(self._topic, self._sign(announcement) if self._sign else announcement, retain=True)

    def publish_sound(self, warn: Callable[[str], None]) -> None:
        """A file of the model has rotted: go on without it. Raises StateError where it is a part, of which there is no other copy."""
        warn("a file of the model was damaged on disk")
        self._course.blobs.put(self._course.config.to_bytes())
        self.publish()


def announced(run: Run, packet_limit: int | None) -> bytes:
    """With as many patches as fit, signed or not. Without them devices fetch whole parts: they only save bytes."""
    message, limit = encode(run), MAX_MESSAGE_BYTES
    if packet_limit is not None:
        limit = min(limit, packet_limit - PACKET_MARGIN_BYTES - SIGNATURE_BYTES)
    if len(message) <= limit:
        return message
    return encode(run.model_copy(update={"patches": _fewer(run.patches, len(message) - limit)}))


def _fewer(patches: dict[Part, tuple[Patch, ...]], excess: int) -> dict[Part, tuple[Patch, ...]]:
    """Without the oldest, of parts that have most first, until `excess` bytes are saved."""
    left = dict(patches)
    while excess > 0 and (part := max(left, key=lambda part: len(left[part]), default=None)) is not None and left[part]:
        excess -= len(left[part][0].model_dump_json())
        left[part] = left[part][1:]
    return {part: steps for part, steps in left.items() if steps}
