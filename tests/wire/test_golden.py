"""What version 1 wrote once must be written and read for ever. A change here needs a new version of the protocol.

Two differences are harmless and would only need new files: another order of keys, another way to write a number.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lwfed.blobs import BlobStore
from lwfed.config import RunConfig
from lwfed.wire import tensors
from lwfed.wire.messages import DOWN, UP, Fail, Manifest, Offer, Run, decode, encode

from .samples import SAMPLES

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = {**{name: name for name in SAMPLES}, "run": "run-graphs", "offer": "offer-onnx", "fail": "fail-attempt"}  # as written today
BLOB = bytes(range(256)) * 20 + b"end"
TENSORS = {"b.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.array([-0.5, 1e-7], dtype=np.float32)}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_message_is_written_and_read_as_ever(name):
    golden = (GOLDEN / f"{FILES[name]}.json").read_bytes()
    assert encode(SAMPLES[name]) == golden
    assert decode(type(SAMPLES[name]), golden) == SAMPLES[name]


@pytest.mark.parametrize(
    ("earlier", "silent"),
    [
        ("run", {"lr_scale": 1.0, "patches": {}, "graphs": {}}),
        ("run-lr-scale", {"patches": {}, "graphs": {}}),
        ("run-patches", {"graphs": {}}),
    ],
)
def test_a_run_that_says_nothing_of_rate_patches_or_graphs_is_read_as_one_with_the_whole_rate_and_without(earlier, silent):
    assert decode(Run, (GOLDEN / f"{earlier}.json").read_bytes()) == SAMPLES["run"].model_copy(update=silent)


def test_a_run_that_is_paused_says_so_and_no_other_says_anything_of_pauses():
    paused = SAMPLES["run"].model_copy(update={"paused": True, "phase": "waiting", "patches": {}, "graphs": {}})
    golden = (GOLDEN / "run-paused.json").read_bytes()
    assert encode(paused) == golden
    assert decode(Run, golden) == paused
    assert b"paused" not in encode(SAMPLES["run"])  # devices from before pauses refuse keys that they do not know


def test_an_offer_computed_by_torch_alone_says_nothing_of_onnx_runtime():
    report = SAMPLES["offer"].report
    alone = report.execution.model_copy(update={"prefix": "torch", "onnxruntime": None})
    offer = SAMPLES["offer"].model_copy(update={"report": report.model_copy(update={"execution": alone})})
    golden = (GOLDEN / "offer.json").read_bytes()
    assert encode(offer) == golden  # servers from before its version was said refuse keys that they do not know
    assert decode(Offer, golden) == offer


def test_a_first_failure_in_a_round_says_nothing_of_attempts():
    first = SAMPLES["fail"].model_copy(update={"attempt": 1})
    golden = (GOLDEN / "fail.json").read_bytes()
    assert encode(first) == golden  # servers from before attempts were counted refuse keys that they do not know
    assert decode(Fail, golden) == first


def test_every_kind_has_a_golden_file():
    assert SAMPLES.keys() == UP.keys() | DOWN.keys() | {"server-state", "run", "enrol", "admission"}
    earlier = {"run.json", "run-lr-scale.json", "run-patches.json", "run-paused.json", "offer.json", "fail.json"}
    others = {"blob-manifest.json", "config.json"}
    assert {path.name for path in GOLDEN.glob("*.json")} == {f"{name}.json" for name in FILES.values()} | earlier | others


def test_a_configuration_is_read_and_written_as_ever():
    golden = (GOLDEN / "config.json").read_bytes()  # with keys of 0.1.0: those that came later stand in LATER
    config = RunConfig.from_bytes(golden)
    assert config.to_bytes() == golden
    assert (config.run.name, config.round_counts, config.aggregation.trim, config.alignment.method) == ("golden", (2, 3, 4), 0.2, "off")


def test_a_blob_is_cut_as_ever(tmp_path):
    store = BlobStore(tmp_path, durable=False)
    golden = (GOLDEN / "blob-manifest.json").read_bytes()
    assert encode(store.manifest(store.put(BLOB).id, 1024)) == golden
    part = BlobStore(tmp_path / "other", durable=False).part(decode(Manifest, golden))
    for index in range(6):
        part.write(index, BLOB[index * 1024 : (index + 1) * 1024])
    assert part.commit().read_bytes() == BLOB


def test_tensors_are_written_and_read_as_ever():
    golden = (GOLDEN / "tensors.safetensors").read_bytes()
    assert tensors.encode(TENSORS) == golden
    found = tensors.decode(golden, {"a.bias": (2,), "b.weight": (2, 3)})
    assert all(np.array_equal(found[name], TENSORS[name]) for name in TENSORS)
