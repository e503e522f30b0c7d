"""How a device computes a stage: chosen within its memory."""

import math
import sys
import types
import weakref

import numpy as np
import pytest
import torch

from lwfed.config import load_config
from lwfed.edge_agent import means as module
from lwfed.errors import Unfit
from lwfed.models import fitting, prefix
from lwfed.models.initial import init_parts

from .planning import Room, config, means, needs_onnx

pytestmark = pytest.mark.usefixtures("one_thread")


def test_where_nothing_is_frozen_torch_does_it_all():
    found = means(config("train.prefix=auto"), 1)
    assert (found.engine, found.micro_batch, found.reason) == ("torch", 20, "no layer is frozen")


def test_a_backbone_with_batch_statistics_says_why_batches_stay_whole():
    made = load_config("resnet18", ["model.image_size=8", "train.prefix=torch", "train.micro_batch=auto"])
    found = means(made, 1)
    assert found.micro_batch == 20
    assert found.reason.endswith("; batches whole, for this backbone has statistics of the batch")


@needs_onnx
@pytest.mark.parametrize("engine", ["onnx", "onnx_int8"])
def test_an_engine_that_is_asked_for_is_used(graphs, engine):
    found = means(config(f"train.prefix={engine}", "train.micro_batch=4"), 3, graphs)
    assert (found.engine, found.micro_batch, found.means.prefix.engine) == (engine, 4, engine)


@needs_onnx
def test_auto_says_how_fast_each_is(graphs):
    found = means(config("train.prefix=auto"), 3, graphs)
    assert all(f"{engine} " in found.reason for engine in ("torch", "onnx", "onnx_int8"))


@needs_onnx
def test_an_engine_without_room_is_refused_with_what_it_lacks(graphs, monkeypatch):
    room = Room(monkeypatch, "auto")
    room.bytes = room.needs("torch")
    monkeypatch.setattr("lwfed.edge_agent.means.ONNX_BYTES", 9.5e6)
    lacks = [math.ceil((room.needs(engine, 9.5e6) - room.bytes) / 1e6) for engine in ("onnx", "onnx_int8")]
    assert means(room.config, 3, graphs).reason == "; ".join(
        f"{engine} would take {lack} MB more than the budget" for engine, lack in zip(("onnx", "onnx_int8"), lacks, strict=True)
    )
    assert means(room.config, 3, graphs, budget_mb=None).reason.endswith("MB more than there is")
    room.bytes += 1e6 * max(lacks)
    assert "would take" not in means(room.config, 3, graphs).reason
    room.bytes = room.needs("torch") - 1
    with pytest.raises(Unfit, match=r"lower train\.batch_size; onnx would take \d+ MB more .*; onnx_int8 would take \d+ MB more than the"):
        means(room.config, 3, graphs)


@needs_onnx
def test_int8_trains_where_torch_has_no_room(graphs, monkeypatch):
    """Its tokens are half as large."""
    room = Room(monkeypatch, "auto")
    room.bytes = room.needs("torch") - 1
    assert room.needs("onnx_int8") < room.bytes
    found = means(room.config, 3, graphs)
    assert (found.engine, found.needs_mb * 1e6 <= room.bytes) == ("onnx_int8", True)
    assert "; torch would take 1 MB more than the budget" in found.reason


@needs_onnx
@pytest.mark.parametrize(("mapped", "least"), [(0.0, "onnx_int8"), (3e6, "torch")])
def test_the_engine_of_the_least_memory_is_told_which_is_not_int8_where_onnx_runtime_takes_more_than_tokens_give(
    graphs, monkeypatch, mapped, least
):
    room = Room(monkeypatch, "onnx_int8")
    room.mapped = mapped
    assert (room.needs("onnx_int8", mapped) < room.needs("torch")) == (least == "onnx_int8")
    found = means(room.config, 3, graphs)
    assert (found.engine, found.least) == ("onnx_int8", least)


@needs_onnx
def test_no_more_images_go_through_an_engine_at_a_time_than_it_was_judged_by(graphs, monkeypatch):
    room = Room(monkeypatch, "onnx_int8")
    room.config = config("train.prefix=onnx_int8", "train.micro_batch=auto")
    foreseen = 2e6  # of ONNX Runtime, which turns out to take nothing
    monkeypatch.setattr("lwfed.edge_agent.means.ONNX_BYTES", foreseen)
    room.bytes = room.needs("onnx_int8", foreseen)
    judged = []
    make = module.make_prefix
    monkeypatch.setattr(module, "make_prefix", lambda *given: judged.append(given[5]) or make(*given))
    found = means(room.config, 3, graphs)
    assert judged[0] < 20
    assert found.micro_batch == judged[0]


@needs_onnx
def test_an_engine_that_takes_more_than_foreseen_is_let_go(graphs, monkeypatch):
    sessions = []
    make = prefix.OnnxPrefix.__init__

    def remember(self, *given):
        sessions.append(weakref.ref(self))
        make(self, *given)

    monkeypatch.setattr(prefix.OnnxPrefix, "__init__", remember)
    room = Room(monkeypatch, "onnx_int8")
    room.bytes, room.mapped = room.needs("torch") + 1e6, 3e6
    found = means(room.config, 3, graphs)
    lacks = math.ceil((room.needs("onnx_int8", 3e6) - room.bytes) / 1e6)
    assert (found.engine, found.reason) == ("torch", f"onnx_int8 would take {lacks} MB more than the budget")
    assert [one() for one in sessions] == [None]


def test_without_onnx_runtime_training_goes_on_with_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "graph").write_bytes(b"graph")
    found = means(config("train.prefix=onnx"), 3, {"onnx": tmp_path / "graph"})
    assert found.engine == "torch"
    assert "pip install 'lwfed[onnx]'" in found.reason


def test_a_budget_below_the_process_itself_is_refused_with_a_way_out():
    with pytest.raises(Unfit, match=r"stage 2: .*room for 0 MB; raise the memory budget or lower train\.batch_size"):
        means(config(), 2, budget_mb=1)


@pytest.fixture
def on_gpu(monkeypatch):
    """What is found for a GPU, as torch would tell of it."""

    def find(integrated, free, budget_mb):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 64e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(is_integrated=integrated))
        monkeypatch.setattr(module._Search, "_memory", lambda search: (1e8, search.budget_mb * 1e6 - 1e8))
        made = config("train.micro_batch=16")
        return module._Search(made, 3, init_parts(made, made.plan(3).present), np.zeros((20, 3, 8, 8), np.uint8), budget_mb).on_gpu()

    return find


def test_the_budget_holds_on_a_gpu_that_shares_main_memory(on_gpu):
    apart, shared = (on_gpu(integrated, 8e9, 1000) for integrated in (False, True))
    assert (apart.needs_mb, apart.micro_batch, shared.micro_batch) == (100, 16, 16)
    assert shared.needs_mb > 120, "training takes main memory"
    assert on_gpu(False, 8e9, 101).micro_batch == 16, "training takes memory of its own"
    with pytest.raises(Unfit, match="raise the memory budget"):
        on_gpu(True, 8e9, 101)
    with pytest.raises(Unfit, match="there is room for 1 MB"):
        on_gpu(True, 1e6, 1000)


def test_what_cannot_fit_is_refused_before_anything_is_tried(tmp_path, monkeypatch):
    for name in ("measure", "code_bytes"):
        monkeypatch.setattr(fitting, name, None)
    with pytest.raises(Unfit, match=r"stage 3: training .* takes \d+ MB more, and there is room for 0 MB; raise the memory budget"):
        means(config(), 3, tmp_path, budget_mb=1.0)


def test_without_a_budget_a_refusal_says_what_the_room_is_a_share_of(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "own_share_bytes", lambda: 1e4)
    with pytest.raises(Unfit, match=r"room for 0 MB \(80 % of what is available, without a memory budget\); free memory or lower"):
        means(config(), 3, tmp_path, budget_mb=None)
