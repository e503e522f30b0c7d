"""How many bytes a message takes in MQTT, and which filters a topic matches."""

from __future__ import annotations


def publish_bytes(topic: str, payload: bytes, version5: bool) -> int:
    """The size of a PUBLISH packet at QoS 1: fixed header, topic, packet id, (empty) properties of MQTT 5, payload."""
    remaining = 2 + len(topic.encode()) + 2 + version5 + len(payload)
    length_digits = 1 + (remaining >= 1 << 7) + (remaining >= 1 << 14) + (remaining >= 1 << 21)
    return 1 + length_digits + remaining


def matches(filter: str, topic: str) -> bool:
    """Whether a subscription to `filter` receives `topic`: ``+`` is one level, a final ``#`` its parent and all below."""
    if "+" not in filter and "#" not in filter:
        return filter == topic
    wanted, levels = filter.split("/"), topic.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):
        return False
    if wanted[-1] == "#":
        wanted.pop()
        levels = levels[: len(wanted)]
    return len(wanted) == len(levels) and all(want in ("+", level) for want, level in zip(wanted, levels, strict=True))
