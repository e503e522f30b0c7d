"""The worker process, its jobs and the side that gives them."""

import itertools
import queue
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lwfed.child import Ended, Said
from lwfed.cloud_server import torch_jobs
from lwfed.cloud_server.halves import halves
from lwfed.cloud_server.worker import Worker
from lwfed.cloud_server.workshop import Workshop, starter
from lwfed.errors import DataError, Diverged, MissingDependency, WorkerFailed
from lwfed.models.shapes import part_shapes

from .fleets import of, undisturbed
from .world import NumpyWorker


@pytest.fixture
def job(tmp_path, tiny):
    config = tiny("calibration.batch_size=64", "calibration.epochs=1")
    (tmp_path / "config").write_bytes(config.to_bytes())
    (tmp_path / "out").mkdir()
    places = {"config": str(tmp_path / "config"), "out": str(tmp_path / "out"), "kept": str(tmp_path / "kept"), "parts": {}, "graphs": []}
    return lambda do, **more: {"do": do, **places, **more}


def do(worker, job):
    results = []
    worker.handle(job, results.append)
    return results[-1]


def test_jobs_prepare_calibrate_evaluate(job, tiny):
    worker = Worker()
    prepared = do(worker, job("prepare", stage=1, attempt=1))
    assert set(prepared["parts"]) == set(tiny().plan(1).added)
    assert prepared["shapes"] == {part: part_shapes(tiny(), part) for part in (*tiny().plan(1).present, "layer.2")}
    initial = load_file(prepared["parts"]["layer.1"])
    assert {name: value.shape for name, value in initial.items()} == part_shapes(tiny(), "layer.1")

    calibrated = do(worker, job("calibrate", stage=1, round=1, lr_scale=1.0, parts=prepared["parts"]))
    assert set(calibrated["parts"]) == set(tiny().plan(1).calibrated)
    assert calibrated["loss"] > 0
    trained = load_file(calibrated["parts"]["layer.1"])
    assert not np.array_equal(trained["blocks.0.mlp.fc1.weight"], initial["blocks.0.mlp.fc1.weight"])

    found = do(worker, job("evaluate", names=["random", "raw_pixels", "trained"], parts=calibrated["parts"]))
    scores = found["scores"]
    assert scores["raw_pixels"]["knn"]["accuracy"] > 0.8  # digits of 8x8 pixels are easy
    assert 0 < scores["trained"]["knn"]["f1"] < scores["raw_pixels"]["knn"]["f1"]
    assert scores["trained"]["probe"]["class_accuracy"] > 0
    assert not found["variety"]["collapsed"]
    assert found["variety"]["rank"] > 1.5
    again = do(Worker(), job("evaluate", names=["random"]))
    assert again["scores"]["random"] == scores["random"]
    assert again["variety"] is None


def test_graphs_come_with_the_weights_of_a_stage_or_the_reason_why_not(job, monkeypatch):
    def prepare():
        prepared = do(Worker(), job("prepare", stage=1, attempt=1, graphs=["onnx"]))
        assert prepared["parts"]
        return prepared["graphs"], prepared["no_graphs"]

    made = []
    monkeypatch.setattr(torch_jobs, "make_graphs", lambda model, engines, folder: made.append(model) or {"onnx": folder / "layer"})
    graphs, reason = prepare()
    assert (Path(graphs["onnx"]).name, reason, made[0].width) == ("layer", None, 8)

    def missing(*_):
        raise MissingDependency("pip install onnx")

    monkeypatch.setattr(torch_jobs, "make_graphs", missing)
    assert prepare() == ({}, "pip install onnx")


def test_each_attempt_at_a_stage_has_weights_of_its_own(job):
    def weights(attempt):
        return load_file(do(Worker(), job("prepare", stage=2, attempt=attempt))["parts"]["layer.2"])["blocks.1.mlp.fc1.weight"]

    found = [weights(attempt) for attempt in (1, 2, 3, 2)]
    assert np.array_equal(found[1], found[3])
    assert not any(np.array_equal(one, other) for one, other in itertools.combinations(found[:3], 2))


def test_calibration_obeys_what_plateaus_leave_of_the_rate(tmp_path, tiny, job):
    (tmp_path / "config").write_bytes(tiny("calibration.batch_size=64", "train.lr_schedule=plateau").to_bytes())
    start = do(Worker(), job("prepare", stage=1, attempt=1))["parts"]
    before = load_file(start["norm"])["fc_norm.weight"]

    def change(lr_scale):
        (tmp_path / "out" / "calibrated").mkdir(exist_ok=True)
        order = {**job("calibrate", stage=1, round=1, lr_scale=lr_scale, parts=start), "out": str(tmp_path / "out" / "calibrated")}
        return np.abs(load_file(do(Worker(), order)["parts"]["norm"])["fc_norm.weight"] - before).sum()

    assert change(1e-9) < 1e-3 * change(1.0)


def test_halves_are_stratified_disjoint_and_repeatable():
    labels = np.repeat([0, 1, 2], [10, 5, 1])
    bank, queries = halves(labels, 7)
    assert sorted([*bank, *queries]) == list(range(16))
    assert np.bincount(labels[bank]).tolist() == [5, 3, 1]
    assert halves(labels, 7)[0].tolist() == bank.tolist() != halves(labels, 8)[0].tolist()


class Script:
    """A process that says what it is told to say, one answer a job."""

    def __init__(self, answers):
        self.answers, self.jobs, self.warnings, self.started, self.events = answers, [], [], 0, queue.SimpleQueue()

    def start(self, deliver):
        self.started += 1
        self.process = Process(self)
        return self.process


class Process:
    def __init__(self, script):
        self.script = script

    def send(self, job):
        self.script.jobs.append(job)
        answer = self.script.answers.pop(0)
        self.script.events.put(Ended(self, "killed", "ended by SIGKILL") if answer == "dies" else Said(self, answer))

    def kill(self):
        pass

    def close(self):
        pass


@pytest.fixture
def workshop(tmp_path):
    def workshop(*answers):
        script = Script(list(answers))
        return Workshop(script.start, script.events.put, script.warnings.append, tmp_path / "work", linger_s=10), script

    return workshop


DONE = {"event": "prepared", "parts": {}}
ERROR = {"event": "error", "kind": "OutOfMemory", "message": "no memory"}


def play(workshop, script):
    while workshop.busy:
        result = workshop.on(script.events.get_nowait(), now=0.0)
    return result


def test_a_job_is_done_again_when_the_process_dies_or_runs_out_of_memory(workshop):
    one, script = workshop("dies", ERROR, DONE)
    one.submit({"do": "prepare"})
    assert play(one, script) == DONE
    assert script.started == 3
    assert script.jobs == [{"do": "prepare"}] * 3
    assert script.warnings == [
        "the server could not prepare: the worker process ended by SIGKILL; it tries again (attempt 2 of 3)",
        "the server could not prepare: no memory; it tries again (attempt 3 of 3)",
    ]


def test_a_process_that_keeps_dying_is_an_error(workshop):
    one, script = workshop("dies", "dies", "dies")
    one.submit({"do": "prepare"})
    with pytest.raises(WorkerFailed, match=r"could not prepare in 3 attempts.*SIGKILL.*state is safe"):
        play(one, script)
    assert len(script.warnings) == 2, "what ends the server is said once"


@pytest.mark.parametrize(("kind", "error"), [("DataError", DataError), ("Diverged", Diverged)])
def test_an_error_that_repetition_cannot_mend_is_raised_at_once(workshop, kind, error):
    one, script = workshop({"event": "error", "kind": kind, "message": "as it is"})
    one.submit({"do": "calibrate"})
    with pytest.raises(error, match="as it is"):
        play(one, script)
    assert not one.busy
    assert one.next_wakeup() == 10  # then the process is ended
    assert script.warnings == []


def test_the_process_is_kept_for_a_while_and_then_ended(workshop):
    one, script = workshop(DONE, DONE, DONE)
    one.submit({"do": "prepare"})
    play(one, script)
    assert one.next_wakeup() == 10
    one.submit({"do": "prepare"})
    play(one, script)
    assert script.started == 1
    one.poll(now=10)
    assert script.warnings == []
    one.submit({"do": "prepare"})
    assert script.started == 2


def test_an_idle_process_that_dies_is_nothing_to_speak_of(workshop):
    one, script = workshop(DONE, DONE)
    one.submit({"do": "prepare"})
    play(one, script)
    assert one.on(Ended(script.process, "killed", "ended by SIGKILL"), now=1.0) is None
    one.submit({"do": "prepare"})
    assert play(one, script) == DONE
    assert (script.started, script.warnings) == (2, [])


def test_one_job_at_a_time(workshop):
    one, _ = workshop(DONE)
    one.submit({"do": "prepare"})
    with pytest.raises(RuntimeError, match="busy"):
        one.submit({"do": "prepare"})


def test_the_real_process_does_a_job(tmp_path, job):
    events = queue.Queue()
    one = Workshop(starter(threads=1), events.put, pytest.fail, tmp_path / "out", linger_s=1)
    one.submit(job("prepare", stage=1, attempt=1))
    while one.busy:
        result = one.on(events.get(timeout=60), now=0.0)
    one.end()
    assert result["event"] == "prepared"


def test_a_worker_that_dies_as_it_aggregates_changes_no_bit_and_is_told_of_each_time(world, said, monkeypatch):
    undisturbed_encoder = undisturbed(world).finish()
    send, died = NumpyWorker.send, []

    def dies_at_first(worker, job):
        if job["do"] == "aggregate" and job not in died:
            died.append(job)
            worker._deliver(Ended(worker, "killed", "ended by SIGKILL"))
        else:
            send(worker, job)

    monkeypatch.setattr(NumpyWorker, "send", dies_at_first)
    said.clear()
    assert undisturbed(world).finish() == undisturbed_encoder
    warnings = [one["text"] for one in of(said, "warning")]
    assert len(warnings) == len(died) == 4, "rounds"
    assert all("the server could not aggregate: the worker process ended by SIGKILL; it tries again" in text for text in warnings)
