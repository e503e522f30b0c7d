"""Whatever arrives, every decoder refuses it by an exception that its callers know, or reads it; at a bounded cost."""

from __future__ import annotations

import contextlib
import json
import time
import tracemalloc
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .decoders import DECODERS, mutated

MOST_BYTES = 16 << 20  # of memory at a time, for the 128 KiB that a message may have
MOST_S = 1.0  # of the processor


def check(decoder, data):
    begun = time.process_time()
    tracemalloc.start()
    with contextlib.suppress(*decoder.refuses):
        decoder.decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MOST_BYTES
    assert time.process_time() - begun < MOST_S


@pytest.mark.parametrize("name", DECODERS)
def test_nothing_but_a_refusal_ever_escapes(name):
    decoder = DECODERS[name]
    decoder.decode(decoder.samples[0])

    @settings(max_examples=200, deadline=None)
    @given(st.integers(0, 2**63))
    def no_other_exception(seed):
        check(decoder, mutated(Random(seed), decoder.samples))

    no_other_exception()


LONG = {
    "depth": b"[" * 100_000,
    "depth of objects": b'{"v":' * 25_000,
    "many": json.dumps([[]] * 40_000).encode(),
    "number": b"9" * 130_000,
    "text": b'"' + b"\\u0000" * 21_000 + b'"',
    "too long": b"1" * 200_000,
}


@pytest.mark.parametrize("data", LONG.values(), ids=LONG)
def test_what_is_long_costs_little(data):
    for decoder in DECODERS.values():
        check(decoder, data)
