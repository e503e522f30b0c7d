from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from lwfed.transport.packets import matches, publish_bytes

LEVEL = st.sampled_from(["a", "b", "", "$x"])
TOPIC = st.lists(LEVEL, min_size=1, max_size=4).map("/".join)
FILTER = st.tuples(st.lists(LEVEL | st.just("+"), max_size=4), st.booleans()).map(lambda f: "/".join([*f[0], *(["#"] if f[1] else [])]))


@given(FILTER.filter(bool), TOPIC.filter(bool))
def test_filters_match_as_those_of_paho(filter, topic):
    assert matches(filter, topic) == topic_matches_sub(filter, topic)


@pytest.mark.parametrize(("size", "header"), [(0, 2), (120, 2), (121, 3), (16376, 3), (16377, 4), (2097144, 4), (2097145, 5)])
def test_the_size_of_a_packet(size, header):
    """MQTT 3.1.1, sections 2.2.3 and 3.3: type and length; the topic with its length, 5; the packet's number, 2; payload."""
    assert publish_bytes("a/b", bytes(size), version5=False) == header + 5 + 2 + size


def test_version_5_adds_the_length_of_no_properties():
    assert publish_bytes("ä", b"x", version5=True) == publish_bytes("ä", b"x", version5=False) + 1 == 2 + 4 + 2 + 1 + 1
