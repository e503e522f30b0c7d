"""How a device computes a stage: chosen within its memory, kept over rounds, the same in every repetition."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
import types
import weakref

import numpy as np
import pytest
import torch

from lwfed.config import load_config
from lwfed.edge_agent import means as module
from lwfed.edge_agent import worker
from lwfed.edge_agent.means import Found, _Search, find_means
from lwfed.edge_agent.worker import Worker
from lwfed.errors import StateError, Unfit
from lwfed.models import fitting, prefix
from lwfed.models.features import Folder
from lwfed.models.graphs import make_graphs
from lwfed.models.initial import init_parts
from lwfed.models.prefix import SESSIONS
from lwfed.models.step import Means
from lwfed.plan import by_part
from lwfed.wire import tensors as wire

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")),
    reason="ONNX Runtime is not installed: pip install 'lwfed[onnx]'",
)
SMALL = ["model={image_size: 8, patch_size: 4, width: 32, heads: 2, depth: 3}", "ssl={hidden_dim: 8, output_dim: 8}", "train.epochs=1"]
AMPLE_MB = 1e6
REUSED = ["train.prefix=torch", "train.views_per_round=1", "stages.rounds_per_stage=3", "calibration.every=never"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def config(*settings):
    return load_config("demo", [*SMALL, *settings])


@pytest.fixture(scope="session")
def graphs(tmp_path_factory):
    return make_graphs(config().model, ["onnx", "onnx_int8"], tmp_path_factory.mktemp("graphs"))


def means(made, stage, graphs=None, budget_mb=AMPLE_MB):
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    return find_means(made, stage, init_parts(made, made.plan(stage).present), images, budget_mb, graphs or {})


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


class Room:
    """Memory as a test says, in which libraries and ONNX Runtime take nothing; `search` plans the last stage."""

    def __init__(self, monkeypatch, prefix, micro_batch=4):
        monkeypatch.setattr(fitting, "CODE_BYTES", 0.0)
        monkeypatch.setattr(fitting, "code_bytes", lambda *_: 0.0)
        monkeypatch.setattr(fitting, "mapped_by", lambda run: self.mapped)
        monkeypatch.setattr("lwfed.edge_agent.means.ONNX_BYTES", 0.0)
        monkeypatch.setattr("lwfed.edge_agent.means._Search._memory", lambda _: (0.0, self.bytes))
        self.config = config(f"train.prefix={prefix}", f"train.micro_batch={micro_batch}", "train.batch_size=20")
        self.bytes, self.mapped = AMPLE_MB * 1e6, 0.0

    def needs(self, engine, beside=0.0, micro_batch=4):
        images = np.zeros((20, 3, 8, 8), dtype=np.uint8)
        search = _Search(self.config, 3, init_parts(self.config, self.config.plan(3).present), images, AMPLE_MB)
        return search._need(engine, beside + SESSIONS.get(engine, 0.0) * search._frozen_bytes).of(micro_batch)


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


class Device:
    """Training processes on the same folder; those of `fresh` remember nothing."""

    def __init__(self, root, made, stage, graphs=None):
        self.config, self.root, self.stage = made, root, stage
        self.graphs = {engine: str(file) for engine, file in (graphs or {}).items()}
        self.planned, self.reasons, self.recomputes, self.worker = [], [], [], Worker()
        (root / "config").write_bytes(made.to_bytes())
        self.parts = {}
        for part, held in by_part(init_parts(made, made.plan(stage).present)).items():
            self.parts[part] = str(root / part)
            (root / part).write_bytes(wire.encode({name: tensor.numpy() for name, tensor in held.items()}))

    def order(self, round, execution=None, budget_mb=None):
        return {
            "do": "train", "config": str(self.root / "config"), "parts": self.parts, "graphs": self.graphs, "stage": self.stage,
            "round": round, "participant": 0, "lr_scale": 1.0, "data": "digits", "shared": False, "kept": str(self.root / "kept"),
            "out": str(self.root / "out"), "execution": execution, "budget_mb": budget_mb, "after": round - 1 or None,
        }  # fmt: skip

    def train(self, round, execution=None, fresh=False, budget_mb=None):
        (Worker() if fresh else self.worker).handle(self.order(round, execution, budget_mb), self.hear)
        return (self.root / "out").read_bytes()

    def hear(self, said):
        if said["event"] == "planned":
            self.planned.append({name: said[name] for name in ("prefix", "micro_batch")})
            self.reasons.append(said["reason"])
        if said["event"] == "done":
            self.images = said["images"]
        if said["event"] == "recomputes":
            self.recomputes.append(said["why"])


@needs_onnx
@pytest.mark.parametrize("prefix", ["torch", "onnx_int8"])
def test_a_repetition_in_another_process_gives_the_same_bits(tmp_path, graphs, prefix):
    device = Device(tmp_path, config(f"train.prefix={prefix}", "train.micro_batch=16"), 3, graphs)
    first, second = device.train(1), device.train(2, {"prefix": prefix, "micro_batch": 16})
    assert device.train(2, device.planned[0], fresh=True) == second != first
    assert device.planned == [{"prefix": prefix, "micro_batch": 16}] * 3


@needs_onnx
def test_an_engine_is_made_once_a_stage_and_anew_for_other_weights(tmp_path, graphs, monkeypatch):
    made = []
    find = worker.find_means
    monkeypatch.setattr(worker, "find_means", lambda *given: made.append(1) or find(*given))
    device = Device(tmp_path, config("train.prefix=onnx"), 2, graphs)
    device.train(1)
    device.train(2, device.planned[0])
    assert len(made) == 1
    calibrated = tmp_path / "calibrated"
    calibrated.write_bytes((tmp_path / "layer.1").read_bytes())
    device.parts["layer.1"] = str(calibrated)
    device.train(3, device.planned[0])
    assert len(made) == 2
    device.train(3, {**device.planned[0], "micro_batch": 5})
    assert len(made) == 3
    assert device.planned[-1]["micro_batch"] == 5


@needs_onnx
@pytest.mark.parametrize(("micro_batch", "judged"), [(3, 8), (16, 16)])
def test_engines_are_judged_by_several_images_from_among_all(tmp_path, graphs, monkeypatch, micro_batch, judged):
    given, make = [], module.make_prefix
    monkeypatch.setattr(module, "make_prefix", lambda *arguments: given.append(arguments[4:6]) or make(*arguments))
    device = Device(tmp_path, config("train.prefix=onnx_int8", f"train.micro_batch={micro_batch}"), 2, graphs)
    device.train(1)
    ((trial, size),) = given
    assert (len(trial), size, device.planned[0]["prefix"]) == (judged, micro_batch, "onnx_int8")
    assert len(torch.unique(trial, dim=0)) == judged


def test_a_server_that_sends_no_graph_leaves_the_frozen_layers_to_torch(tmp_path):
    device = Device(tmp_path, config("train.prefix=onnx", "train.micro_batch=16"), 2)
    device.train(1, {"prefix": "onnx", "micro_batch": 16})
    assert device.planned == [{"prefix": "torch", "micro_batch": 16}]
    assert device.reasons == ["there is no graph for ONNX Runtime"]


WITHOUT_ONNX = """
import json, sys
sys.modules["onnx"] = None
from lwfed.edge_agent.worker import Worker
Worker().handle(json.load(sys.stdin), lambda said: print(json.dumps(said)))
"""


@needs_onnx
def test_a_device_without_the_package_onnx_runs_the_graph_of_the_server(tmp_path, graphs):
    device = Device(tmp_path, config("train.prefix=onnx", "train.micro_batch=16"), 2, graphs)
    order = json.dumps(device.order(round=1))
    done = subprocess.run([sys.executable, "-c", WITHOUT_ONNX], input=order, capture_output=True, text=True, check=True)
    planned, *_, last = (said for line in done.stdout.splitlines() if (said := json.loads(line))["event"] in ("planned", "done"))
    assert (planned["prefix"], planned["reason"], last["event"]) == ("onnx", "as configured", "done")


def test_what_an_earlier_round_has_fixed_wins_over_the_configuration(tmp_path):
    device = Device(tmp_path, config("train.prefix=torch", "train.micro_batch=16"), 2)
    device.train(1, {"prefix": "torch", "micro_batch": 3})
    assert device.planned == [{"prefix": "torch", "micro_batch": 3}]


class Disk:
    """Writing updates fails as long as more than `free` bytes of features are kept."""

    def __init__(self, monkeypatch, device, free):
        self.features, self.write, self.free = device.root / "kept" / "features", worker.disk.write, free
        monkeypatch.setattr(worker.disk, "write", self)

    def __call__(self, path, data):
        if sum(file.stat().st_size for file in self.features.glob("*")) > self.free:
            raise OSError(28, "No space left on device")
        self.write(path, data)


def test_features_give_way_to_the_update_on_a_full_disk(tmp_path, monkeypatch):
    device = Device(tmp_path, config(*REUSED), 3)
    expected = device.train(1)
    assert list((tmp_path / "kept" / "features").iterdir())
    Disk(monkeypatch, device, free=0)
    assert device.train(1) == expected
    assert not list((tmp_path / "kept" / "features").iterdir())
    Disk(monkeypatch, device, free=-1)
    with pytest.raises(StateError, match=r"model and update cannot be written to .* \(No space left on device\): free some disk space"):
        device.train(2)


def test_features_in_memory_are_counted_in_what_a_stage_needs(tmp_path):
    reused = config(*REUSED)
    in_file, in_memory = means(reused, 3, tmp_path), means(config(*REUSED, "train.features_in=memory"), 3, tmp_path)
    bytes_ = 20 * 2 * (4 * 32 * 2 + 4)  # images, views, tokens, width, float16, CRC-32
    assert (in_file.features_bytes, in_memory.features_bytes) == (0, bytes_)
    assert "memory" not in in_file.reason + in_memory.reason
    assert means(config(*REUSED, "train.features_in=memory", "train.features_as=int8"), 3, tmp_path).features_bytes == 20 * 2 * (
        (4 + 2) * 32 + 4
    )
    assert means(config(*REUSED, "train.features_in=memory"), 1, tmp_path).features_bytes == 0, "nothing is frozen"


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


def test_features_go_to_a_file_where_memory_has_no_room_beside_training(tmp_path, monkeypatch):
    made = config(*REUSED, "train.features_in=memory", "train.micro_batch=4")
    need = fitting.Need(fixed=1e6, per_image=1e5, features=5e6)
    monkeypatch.setattr(fitting, "measure", lambda *_: need)
    monkeypatch.setattr(fitting, "CODE_BYTES", 0.0)
    monkeypatch.setattr(fitting, "code_bytes", lambda *_: 0.0)
    for room, features in ((need.of(4) + 5e6, 5e6), (need.of(4) + 4.9e6, 0)):
        monkeypatch.setattr("lwfed.edge_agent.means._Search._memory", lambda _, room=room: (1e8, room))
        found = means(made, 3, tmp_path)
        assert (found.micro_batch, found.features_bytes) == (4, features)
        assert found.needs_mb == pytest.approx((1e8 + need.of(4) + features) / 1e6)
        assert found.reason.endswith("; features in a file, for memory has no room for them") == (not features)


def test_features_in_memory_live_as_long_as_the_plan_of_their_stage(tmp_path):
    reused = (*REUSED, "transfer.codec=fp32")  # so that a round is the same whatever came before it
    expected = Device(tmp_path, config(*reused), 3).train(2)
    folder = tmp_path / "kept" / "features"
    assert list(folder.iterdir())
    device = Device(tmp_path, config(*reused, "train.features_in=memory"), 3)
    device.train(1)
    assert not list(folder.iterdir()), "what was there is of no use"
    held = device.worker._memory
    assert [held.size(name) for name in held.names()] == [device.images * 2 * (4 * 32 * 2 + 4)]
    assert device.train(2, device.planned[0]) == expected
    assert device.worker._memory is held
    (tmp_path / "calibrated").write_bytes((tmp_path / "layer.1").read_bytes())
    device.parts["layer.1"] = str(tmp_path / "calibrated")
    device.train(3, device.planned[0])
    assert device.worker._memory is not held


@needs_onnx
def test_what_takes_the_least_memory_leaves_onnx_runtime_and_memory_for_features_alone(tmp_path, graphs):
    device = Device(tmp_path, config(*REUSED, "train.prefix=onnx", "train.features_in=memory"), 3, graphs)
    device.train(1)
    assert (device.planned[0]["prefix"], device.worker._memory is None) == ("onnx", False)
    least = {"prefix": "torch", "micro_batch": 4, "features_in": "file"}
    device.train(2, least)
    assert device.planned[1] == {"prefix": "torch", "micro_batch": 4}
    assert device.worker._memory is None
    assert list((tmp_path / "kept" / "features").iterdir())
    found = device.worker._found[1]
    assert (found.means.prefix, found.features_bytes) == (None, 0)
    device.train(3, least)
    assert device.worker._found[1] is found, "one plan for the stage"


def test_features_that_another_engine_or_micro_batch_gave_are_computed_anew_and_that_is_said(tmp_path):
    for stage, size, said in ((2, 4, 0), (3, 4, 0), (3, 8, 1), (3, 8, 0)):
        device = Device(tmp_path, config(*REUSED, f"train.micro_batch={size}"), stage)
        device.train(1)
        assert len(device.recomputes) == said
    device.train(2, {"prefix": "torch", "micro_batch": 2})
    assert device.recomputes[0].endswith(
        "those kept are by torch with 8 images at a time, and not by torch with 2 images at a time, which rounds otherwise"
    )


def test_features_leave_room_for_the_update(tmp_path, monkeypatch):
    device = Device(tmp_path, config(*REUSED), 3)
    update = len(device.train(1))
    Folder(tmp_path / "kept" / "features").forget()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2.5 * update))
    device.train(2)
    assert sum(file.stat().st_size for file in (tmp_path / "kept" / "features").iterdir()) <= 0.5 * update


def test_what_has_no_room_any_more_is_computed_with_fewer_images_at_a_time(tmp_path, monkeypatch):
    """Only where an earlier round has fixed how many, and not the configuration."""
    monkeypatch.setattr(fitting, "micro_batch", lambda config, *_: 2 if config.train.micro_batch == "auto" else refuse())

    def refuse():
        raise Unfit("there is room for 9 MB")

    fixed = {"prefix": "torch", "micro_batch": 3, "features_in": "file"}
    device = Device(tmp_path, config(*REUSED, "train.features_in=memory"), 2)
    device.train(1, fixed)
    assert device.planned == [{"prefix": "torch", "micro_batch": 2}]
    assert device.worker._found[1].features_bytes == 0, "that memory had run out still holds"
    assert "not as before, for stage 2: there is room for 9 MB" in device.reasons[0]
    with pytest.raises(Unfit, match="room for 9 MB"):
        Device(tmp_path, config("train.prefix=torch", "train.micro_batch=3"), 2).train(1, fixed)


@needs_onnx
def test_what_torch_has_no_room_for_any_more_is_computed_by_an_engine_that_has(tmp_path, graphs, monkeypatch):
    """Where an earlier round has fixed torch, and the configuration leaves the choice."""
    room = Room(monkeypatch, "auto", micro_batch="auto")
    room.bytes = room.needs("torch", micro_batch=1) - 1
    device = Device(tmp_path, room.config, 3, graphs)
    device.train(1, {"prefix": "torch", "micro_batch": 4})
    assert device.planned[0]["prefix"] == "onnx_int8"
    assert "torch would take 1 MB more than there is" in device.reasons[0]
    assert "not as before, for stage 3: training in this stage takes" in device.reasons[0]


def test_what_cannot_fit_is_refused_before_anything_is_tried(tmp_path, monkeypatch):
    for name in ("measure", "code_bytes"):
        monkeypatch.setattr(fitting, name, None)
    with pytest.raises(Unfit, match=r"stage 3: training .* takes \d+ MB more, and there is room for 0 MB; raise the memory budget"):
        means(config(), 3, tmp_path, budget_mb=1.0)


def test_without_a_budget_a_refusal_says_what_the_room_is_a_share_of(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "own_share_bytes", lambda: 1e4)
    with pytest.raises(Unfit, match=r"room for 0 MB \(80 % of what is available, without a memory budget\); free memory or lower"):
        means(config(), 3, tmp_path, budget_mb=None)


@pytest.mark.parametrize(("kind", "budget_mb", "room"), [("ext4", 310.0, math.inf), ("tmpfs", 310.0, 1e7), ("tmpfs", 200.0, 0.0)])
def test_files_that_are_memory_get_what_training_leaves_of_the_budget(tmp_path, monkeypatch, kind, budget_mb, room):
    monkeypatch.setattr(worker, "filesystem", lambda _: kind)
    assert worker._left_on(tmp_path, budget_mb, Found(Means(), "", needs_mb=300.0)) == room


def test_without_a_budget_files_in_memory_get_a_share_of_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "filesystem", lambda _: "tmpfs")
    monkeypatch.setattr(worker, "own_share_bytes", lambda: 5e6)
    monkeypatch.setattr(worker, "resident_mb", lambda: 300.0)
    assert worker._left_on(tmp_path, None, Found(Means(), "", needs_mb=302.0)) == 3e6


@pytest.mark.parametrize(("budget_mb", "remedy"), [(None, "free some"), (4000.0, "raise --memory-budget")])
def test_features_keep_to_what_is_left_for_files_in_memory_and_say_that_it_is_memory(tmp_path, monkeypatch, budget_mb, remedy):
    monkeypatch.setattr(worker, "_left_on", lambda *_: 0.0)
    device = Device(tmp_path, config(*REUSED), 3)
    device.train(1, budget_mb=budget_mb)
    assert sum(file.stat().st_size for file in (tmp_path / "kept" / "features").iterdir()) == 0
    assert device.recomputes[-1].endswith(f"are computed each time; its files are memory: {remedy}")
