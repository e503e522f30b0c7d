"""The measuring core, on processes whose memory is known and on a small model."""

import io
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from lwfed.blobs import BlobStore
from lwfed.cloud_server.patches import publish
from lwfed.config import load_config
from lwfed.edge_agent import differences
from lwfed.edge_agent.previous import Turn
from lwfed.edge_agent.profiling import limits, measure, memory, sample
from lwfed.edge_agent.profiling.limits import Group, Limit, NoGroup
from lwfed.edge_agent.profiling.measure import DidNotFit
from lwfed.edge_agent.profiling.memory import Watch, size_mb
from lwfed.edge_agent.profiling.scratch import scratch
from lwfed.edge_agent.resources import filesystem
from lwfed.errors import StateError, WorkerFailed
from lwfed.locks import state_home
from lwfed.models.shapes import part_shapes
from lwfed.wire import tensors

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", '''
import sys
held = []
print("ready", flush=True)
for line in sys.stdin:
    held.append(bytearray(int(line)))
    if int(line) < 2**24:
        held.clear()
    print("done", flush=True)
'''], stdin=0, stdout=1)
child.wait()
"""
TINY = (
    *("model.width=32", "model.depth=2", "model.heads=2", "model.image_size=16", "ssl.hidden_dim=32", "ssl.output_dim=16"),
    *("train.batch_size=8", "train.threads=1", "stages.rounds=2"),
)


@pytest.fixture
def family():
    """A process with a child that takes so many bytes; few give all back."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()

        def take(count):
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
            process.stdout.readline()

        process.take = take
        (process.below,) = memory.psutil.Process(process.pid).children()
        yield process
        process.below.kill()


def test_the_peak_is_the_sum_of_all_processes(family, tmp_path):
    watch = Watch(family.pid)
    baseline = watch.ready(family.pid, 0.0)
    family.take(100_000_000)
    watch.sample()
    family.take(1)
    found = watch.finish(tmp_path, None)
    assert 5 < baseline == pytest.approx(found.baseline_mb, abs=0.1)
    assert found.others_mb > 95
    assert found.peak_mb == pytest.approx(found.computing_mb + found.others_mb, abs=0.2)
    assert found.training_mb > 90


def test_of_the_computing_process_the_peak_between_samples_counts(family, tmp_path):
    watch = Watch(family.pid)
    watch.ready(family.below.pid, 0.0)
    family.take(100_000_000)
    family.take(1)
    found = watch.finish(tmp_path, None)
    if found.source == "samples":
        pytest.skip("this system keeps no high-water mark")
    assert found.computing_mb > 100 > found.others_mb


def test_what_was_held_before_the_imports_were_made_is_part_of_the_peak(family, tmp_path):
    watch = Watch(family.pid)
    family.take(100_000_000)
    watch.sample()
    family.take(1)
    watch.ready(family.pid, 0.0)
    found = watch.finish(tmp_path, None)
    assert found.others_mb < 50 < 100 < found.peak_mb


def test_time_on_processors_is_that_of_the_computing_process():
    watch, before = Watch(os.getpid()), time.process_time()
    assert before <= watch.cpu_s() + 0.05 < time.process_time() + 0.2, "the system counts it in hundredths of a second"


@pytest.mark.parametrize(("kind", "counts"), [("tmpfs", True), ("ext4", False)])
def test_files_in_memory_are_memory(family, tmp_path, monkeypatch, kind, counts):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file").write_bytes(bytes(30_000_000))
    mounts = [types.SimpleNamespace(mountpoint="/", fstype="ext4"), types.SimpleNamespace(mountpoint=str(tmp_path), fstype=kind)]
    monkeypatch.setattr(memory.psutil, "disk_partitions", lambda all: mounts)
    watch = Watch(family.pid)
    watch.ready(family.pid, 0.0)
    found = watch.finish(tmp_path, None)
    assert (found.files_mb, found.files_in_memory) == (30.0, counts)
    assert found.peak_mb - found.computing_mb - found.others_mb == pytest.approx(30 * counts, abs=0.2)
    assert (size_mb(tmp_path / "cache"), filesystem(tmp_path / "cache")) == (30.0, kind)


def test_without_proc_the_samples_count_and_are_marked(family, tmp_path):
    watch = Watch(family.pid, proc=tmp_path)
    watch.ready(family.below.pid, 0.0)
    family.take(50_000_000)
    found = watch.finish(tmp_path, None)
    assert (found.source, found.swap_mb) == ("samples", 0.0)
    assert found.computing_mb > 50


CODECS = [["codec=fp32"], ["codec=int8"], ["codec=bf16"], ["codec=int8", "top_k=0.1"]]


@pytest.mark.parametrize("transfer", CODECS)
def test_bytes_are_those_of_what_agent_and_server_make_of_a_round(tmp_path, transfer):
    """Of another round than the sample's, with calibration of the whole model, and a hundredth as large."""
    config = load_config("base", [*TINY, *(f"transfer.{one}" for one in transfer), "calibration.every=round", "calibration.data=digits"])
    made = sample.make_sample(config, 2, 8, tmp_path)
    plan, random, blobs = config.plan(2), np.random.default_rng(9), BlobStore(tmp_path / "blobs", durable=False)
    assert plan.prefix_moves
    before = {part: tensors.decode(Path(file), part_shapes(config, part)) for part, file in made["parts"].items()}
    after = {part: {name: one + noise(random, one.shape) for name, one in found.items()} for part, found in before.items()}
    old, new = ({part: blobs.put(tensors.encode(found)).id for part, found in model.items()} for model in (before, after))
    published = publish(config.transfer, blobs, old, new, {}, seed=1)
    sent = [blob for _, blob in published.patches.values()] or published.parts.values()
    assert made["bytes_down"] == pytest.approx(sum(blobs.ref(blob).size for blob in sent), rel=0.02)
    received, update = ({name: one for part in plan.uploaded for name, one in model[part].items()} for model in (before, after))
    sent = differences.encode(config, Turn(2, 7, 3, None), update, received, tmp_path / "kept", pytest.fail)
    assert made["bytes_up"] == pytest.approx(len(sent), rel=0.02)


def noise(random, shape):
    return np.float32(1e-5) * random.standard_normal(shape, np.float32)


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "edge-agent"


def test_the_agent_of_this_device_is_measured_and_leaves_nothing(state):
    config, steps, baselines = load_config("base", [*TINY, "transfer.codec=fp32"]), [], []
    with measure.sampled(config, 2, 2) as sample:
        found = measure.agent(config, sample, 2, lambda *step: steps.append(step), baselines.append)
        down, up = (config.plan(2).downloaded, config.plan(2).uploaded)
        assert sample.bytes_down == sum(Path(sample.parts[part]).stat().st_size for part in down)
        assert sample.bytes_up <= sum(Path(sample.parts[part]).stat().st_size for part in up)
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert len(found.steps_s) == len(found.cpu_s) == 2
    assert min(found.steps_s) <= found.step_s <= max(found.steps_s)
    assert 100 < baselines[0] <= found.memory.peak_mb
    assert 5 < found.memory.others_mb < found.memory.computing_mb
    assert found.record()["memory"]["training_mb"] > 0
    assert list(state.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_the_published_baseline_is_measured_the_same_way(state, micro_batch):
    config = load_config("base", [*TINY, "stages.strategy=end_to_end"])
    found = measure.published(config, 1, 3, lambda *_: None, 1000, 1, micro_batch)
    assert (len(found.steps_s), len(found.views_s)) == (3, 3)
    assert all(views < step for views, step in zip(found.views_s, found.steps_s, strict=True))
    assert found.memory.others_mb == 0 < found.memory.training_mb
    assert len(measure.published(config, 1, 50, lambda *_: None, 0.0, 2, micro_batch).steps_s) == 2
    assert list(state.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "message", "error"),
    [
        ("out of memory", "ended by SIGKILL: memory ran out", DidNotFit),
        ("OutOfMemory", "MemoryError: ", DidNotFit),
        ("crashed", "ended by SIGILL", WorkerFailed),
        ("DataError", "no images", WorkerFailed),
    ],
)
def test_want_of_memory_is_told_from_other_failures(kind, message, error):
    found = measure._failed(kind, message)
    assert type(found) is error
    assert message in str(found)


@pytest.mark.parametrize(("memory_ran_out", "error"), [(True, DidNotFit), (False, WorkerFailed), (None, WorkerFailed)])
def test_what_systemd_ends_since_the_kernel_has_ended_another_did_not_fit(tmp_path, monkeypatch, memory_ran_out, error):
    (tmp_path / "stopped.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    monkeypatch.setattr(measure, "OomKills", lambda: types.SimpleNamespace(happened=lambda: memory_ran_out))
    run = measure._Run("stopped", {"PYTHONPATH": str(tmp_path)}, Group(), tmp_path, pytest.fail, pytest.fail)
    with pytest.raises(error, match="ended by SIGTERM"):
        run.measure({}, "ready")


@pytest.mark.slow
def test_a_model_that_cannot_be_made_is_an_error_in_words(tmp_path):
    with pytest.raises(WorkerFailed, match="edge-agent doctor"):
        measure._ask({"config": str(tmp_path / "missing")})


def test_a_place_that_cannot_be_written_is_an_error_in_words(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(StateError, match="XDG_STATE_HOME"), scratch():
        pass


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    place = state_home() / "edge-agent"
    place.mkdir(parents=True)
    return place


MADE = {"parts": {}, "graphs": {}, "no_graphs": None, "data": "", "bytes_down": 0, "bytes_up": 0, "macs": 0.0}


def test_what_a_killed_measurement_has_left_goes_with_the_next(home, monkeypatch):
    monkeypatch.setattr(measure, "_ask", lambda order: MADE)
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    kept = [f"profile-{os.getpid()}-other", "profile-x", "device"]
    for name in (f"profile-{dead.pid}-abc", *kept):
        (home / name).mkdir()
    with measure.sampled(load_config("demo"), 1, 1):
        assert len(list(home.iterdir())) == len(kept) + 1
    assert sorted(one.name for one in home.iterdir()) == sorted(kept)


@pytest.mark.parametrize("where", ["here", "in the process that makes the model"])
def test_a_full_disk_is_said_with_the_folder(home, monkeypatch, where):
    def full(*_):
        raise OSError(28, "No space left on device")

    if where == "here":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        done = subprocess.CompletedProcess([], StateError.exit_code, stderr="No space left on device")
        monkeypatch.setattr(measure.subprocess, "run", lambda *_, **__: done)
    told = pytest.raises(StateError, match=r"edge-agent cannot hold what is measured with \(No space left on device\).*free space")
    with told, measure.sampled(load_config("demo"), 1, 1):
        pass
    assert not list(home.iterdir())


def test_a_group_that_cannot_be_made_is_named_and_not_the_folder_of_the_measurement(home, monkeypatch, tmp_path):
    def busy(*_):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(measure, "_ask", lambda order: MADE)
    monkeypatch.setattr(limits, "limit_without_swap", busy)
    (within := tmp_path / "box").mkdir()
    config, limit = load_config("base", TINY), Limit(512, lambda: limits._own_group(within, 512))
    told = pytest.raises(NoGroup, match=f"^no group can be made in {within}: Device or resource busy; run this as root")
    with told, measure.sampled(config, 2, 1) as sample:
        measure.agent(config, sample, 2, pytest.fail, limit=limit)
    assert (list(home.iterdir()), list(within.iterdir())) == ([], [])


def test_making_a_sample_on_a_full_disk_ends_with_the_code_of_a_state_error(monkeypatch, tmp_path, capsys):
    (tmp_path / "config").write_bytes(load_config("demo").to_bytes())
    order = {"config": str(tmp_path / "config"), "stage": 1, "images": 2, "folder": str(tmp_path / "gone")}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(order)))
    with pytest.raises(SystemExit) as ended:
        sample.main()
    assert ended.value.code == StateError.exit_code
    assert capsys.readouterr().err == "No such file or directory"
