"""The whole agent with a real training process; only broker and server live in this process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from lwfed import child
from lwfed.cloud_server.authority import Authority
from lwfed.config import load_config
from lwfed.console import Console
from lwfed.control_groups import OomKills
from lwfed.data.load import device_images
from lwfed.edge_agent import process, trainer
from lwfed.edge_agent.agent import JOURNAL, LEAST_TORCH_MB, Agent, Join, check_budget, torch_version
from lwfed.edge_agent.journal import Journal
from lwfed.edge_agent.profiling.limits import limited
from lwfed.edge_agent.screen import Screen
from lwfed.errors import ConfigError, DataError, ProtocolMismatch, StateError
from lwfed.models.initial import init_part
from lwfed.models.shapes import shapes
from lwfed.transport.memory import MemoryBroker
from lwfed.wire import messages, tensors
from lwfed.wire.messages import Beat, Fail, Offer, State
from lwfed.wire.signed import signed
from lwfed.wire.topics import Topics

TOPICS = Topics("default")
SMALL = ["model.width=8", "model.heads=2", "model.image_size=8", "ssl.hidden_dim=8", "ssl.output_dim=8", "train.epochs=2"]
EXACT = [*SMALL, "transfer.codec=fp32", "worker.sample_s=0.1"]
CONFIG = load_config("demo", EXACT)
LONGER = load_config("demo", [*EXACT, "train.epochs=10"])  # for this process, however slow, to do something meanwhile


def weights(config, stage):
    def encoded(part):
        return tensors.encode({name: tensor.numpy() for name, tensor in init_part(config, part).items()})

    return {part: encoded(part) for part in config.plan(stage).present}


class Hosted(Agent):
    """Broker and server work whenever the agent would wait; `script` plays what the server decides."""

    def host(self, broker, server, script):
        self.broker, self.server, self.script = broker, server, script
        return self

    def _wait(self):
        self.broker.pump()
        self.server.step(time.monotonic())
        self.script(self)
        self.broker.pump()
        return super()._wait()


@pytest.fixture(autouse=True)
def as_many_threads_as_a_worker():
    before = torch.get_num_threads()
    torch.set_num_threads(CONFIG.train.threads)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def host(tmp_path, server_class):
    def make(script, data="digits", budget_mb=None, config=CONFIG, stage=1):
        broker = MemoryBroker()
        server = server_class(broker, tmp_path / "server", config=config)
        server.parts = {part: server.store.put(data) for part, data in weights(config, stage).items()}
        agent = Hosted(
            Join(data, "default", "tester", tmp_path / "state", 15, budget_mb), broker.transport(), Screen(Console(as_json=True))
        )
        return agent.host(broker, server, script)

    (tmp_path / "state").mkdir()
    return make


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


def assign_once(agent, **place):
    server = agent.server
    if server.greeted and not server.seq:
        server.announce(parts=server.parts, **place)
        server.assign(server.greeted[0], **place)


def kept_baseline(tmp_path):
    journal = Journal(tmp_path / "state" / JOURNAL)
    try:
        return journal.baseline_mb(torch_version())
    finally:
        journal.close()


def test_two_rounds_on_digits_with_one_worker(host, capsys, tmp_path):
    pids = set()

    def script(agent):
        assign_once(agent)
        if agent._process is not None:
            pids.add(agent._process.pid)
        if len(agent.server.received) == 1 and agent.server.seq == 1:
            agent.server.announce(round=2, parts=agent.server.parts)
            agent.server.assign(agent.server.greeted[0], round=2)
        if len(agent.server.received) == 2 and agent._journal.update is None:
            stop()

    agent = host(script)
    agent.run()
    server, said = agent.server, [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first, second = server.of(Offer)[0].report, server.of(Offer)[-1].report
    assert len(pids) == 1
    update = tensors.decode(server.received[0], shapes(CONFIG, CONFIG.plan(1).uploaded))
    assert all(np.isfinite(array).all() for array in update.values())
    assert (first.images, len(first.losses)) == (234, 2)
    assert first.memory.baseline_mb > 50
    assert first.memory.peak_mb > first.memory.baseline_mb
    assert first.memory.baseline_mb == second.memory.baseline_mb
    assert LEAST_TORCH_MB < kept_baseline(tmp_path) == pytest.approx(first.memory.baseline_mb, abs=0.1)
    assert {reading.t_s for reading in first.memory.curve}
    assert server.of(Beat)[0].steps == first.steps
    assert [line["event"] for line in said].count("accepted") == 2
    assert said[-1]["event"] == "stopped"
    assert not [line for line in said if line["event"] == "warning"]

    again = trainer.train(CONFIG, 1, 1, 0, trainer.load_parts(CONFIG, 1, paths(server)), device_images("digits", CONFIG, 0).pixels)[0]
    assert tensors.encode(again) == server.received[0], "a repetition elsewhere gives the same bits"


def paths(server):
    return {part: server.store.path(ref.id) for part, ref in server.parts.items()}


@dataclass
class KillOnce:
    """The training process, in the middle of its first task."""

    before: Callable[[], object] = lambda: None
    done: bool = False

    def __call__(self, agent):
        if not self.done and agent._process is not None and agent.server.of(Beat):
            self.done = True
            self.before()
            os.kill(agent._process.pid, signal.SIGKILL)


@pytest.fixture
def vmstat(tmp_path, monkeypatch):
    """What the kernel says about itself."""
    file = tmp_path / "proc" / "vmstat"
    file.parent.mkdir()
    file.write_text("pgfault 7\noom_kill 3\n")
    monkeypatch.setattr(child, "OomKills", lambda: OomKills(file.parent, tmp_path / "cgroup"))
    return file


def test_a_worker_that_somebody_kills_in_the_middle_of_a_task_leaves_the_same_update(host, capsys, vmstat):
    kill = KillOnce()

    def script(agent):
        assign_once(agent)
        kill(agent)
        if agent.server.received and agent._journal.update is None:
            stop()

    agent = host(script, config=LONGER)
    agent.run()
    assert kill.done
    assert not agent.server.of(Fail)
    (warning,) = [line["text"] for line in map(json.loads, capsys.readouterr().out.splitlines()) if line["event"] == "warning"]
    assert "ended by SIGKILL: somebody did that" in warning
    assert "stage 1, round 1 begins again" in warning
    images = device_images("digits", LONGER, 0).pixels
    undisturbed = trainer.train(LONGER, 1, 1, 0, trainer.load_parts(LONGER, 1, paths(agent.server)), images)[0]
    assert agent.server.received == [tensors.encode(undisturbed)]


def test_a_worker_that_the_kernel_kills_for_want_of_memory_is_reported_and_the_next_takes_less(host, capsys, vmstat):
    kill = KillOnce(before=lambda: vmstat.write_text("pgfault 9\noom_kill 4\n"))

    def script(agent):
        server = agent.server
        assign_once(agent)
        kill(agent)
        if server.of(Fail) and agent._journal.task is None and not server.received:
            server.assign(server.greeted[0])
        if server.received and agent._journal.update is None:
            stop()

    agent = host(script, config=LONGER)
    agent.run()
    assert [fail.code for fail in agent.server.of(Fail)] == ["memory"]
    assert "memory ran out" in agent.server.of(Fail)[0].reason
    assert "goes on with the least memory, since memory ran out: 4 images at a time instead of 32" in capsys.readouterr().out
    assert agent.server.of(Offer)[0].report.execution.micro_batch == 4


HUNGRY = (  # 515 MB for a batch that is not cut, 94 MB with 4 images at a time
    *("model.image_size=64", "model.depth=6", "stages.layers_per_stage=6", "stages.rounds_per_stage=1", "ssl.hidden_dim=32"),
    *("train.batch_size=64", "train.micro_batch=64", "train.epochs=1", "data.devices=1", "data.auxiliary_share=0", "data.partition=even"),
)


@pytest.mark.slow  # what has hardly any memory left reads its code from the disk again and again
def test_a_worker_that_the_kernel_kills_in_a_control_group_is_reported_and_the_next_one_fits(host, tmp_path, monkeypatch, capsys):
    limit = limited(384)
    if limit.problem:
        pytest.skip(limit.problem)
    np.savez(tmp_path / "images.npz", train_images=np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8))
    config = load_config("demo", HUNGRY)

    def script(agent):
        server = agent.server
        assign_once(agent)
        if server.of(Fail) and agent._journal.task is None and not server.received:
            server.assign(server.greeted[0])
        if server.received and agent._journal.update is None:
            stop()

    agent = host(script, str(tmp_path / "images.npz"), budget_mb=20_000, config=config)  # of which the group leaves 384
    server = agent.server
    with limit.group() as group:
        monkeypatch.setattr(process, "Child", partial(child.Child, within=group.command))
        agent.run()
    (fail,) = server.of(Fail)
    assert (fail.code, fail.reason) == ("memory", "the training process ended by SIGKILL: memory ran out")
    assert "goes on with the least memory, since memory ran out: 4 images at a time instead of 64" in capsys.readouterr().out
    report = server.of(Offer)[0].report
    assert report.execution.micro_batch == 4
    assert report.memory.peak_mb < 384


CRASHES = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"


def test_a_runtime_that_crashes_costs_a_round_and_torch_does_the_next(host, tmp_path, monkeypatch, capsys):
    """Native code of ONNX Runtime, which runs in the training process, as the graphs of a server might bring it down."""
    (tmp_path / "onnxruntime.py").write_text(CRASHES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = load_config("demo", [*SMALL, "model.depth=2", "train.prefix=onnx", "train.epochs=1", "transfer.codec=fp32"])

    def script(agent):
        server = agent.server
        if server.greeted and not server.seq:
            server.announce(**place, round=1)
            server.assign(server.greeted[0], stage=2, round=1)
        if server.of(Fail) and server.seq == 1:
            server.announce(**place, round=2)
            server.assign(server.greeted[0], stage=2, round=2)
        if server.received and agent._journal.update is None:
            stop()

    (tmp_path / "photos").mkdir()
    for number in range(8):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    agent = host(script, data=str(tmp_path / "photos"), config=config, stage=2)
    place = {"stage": 2, "parts": agent.server.parts, "graphs": {"onnx": agent.server.store.put(b"graph")}}
    agent.run()
    (fail,) = agent.server.of(Fail)
    assert (fail.code, fail.round) == ("worker", 1)
    assert "SIGSEGV" in fail.reason
    offer = agent.server.of(Offer)[0]
    assert (offer.round, offer.report.execution.prefix) == (2, "torch")
    assert "torch runs frozen layers" in capsys.readouterr().out


def test_too_few_images_are_reported_with_the_reason(host, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photos" / "only.png")

    def script(agent):
        assign_once(agent)
        if agent.server.of(Fail):
            stop()

    agent = host(script, data=str(tmp_path / "photos"))
    agent.run()
    fail = agent.server.of(Fail)[0]
    assert fail.code == "data"
    assert "1 readable images" in fail.reason
    assert "data.min_images is 8" in fail.reason


def test_an_enrolled_agent_follows_what_its_server_has_signed_alone(server_class, tmp_path, capsys):
    authority = Authority(tmp_path)
    (tmp_path / "state" / "identity").mkdir(parents=True)
    (tmp_path / "state" / "identity" / "authority.pem").write_bytes(authority.pem)
    broker = MemoryBroker()
    server = server_class(broker, tmp_path / "server", config=CONFIG)

    def script(agent):
        if server.greeted and not server.seq:
            server.announce(run="forged")
            server.announce(run="true", sealed=lambda announcement: signed(announcement, "default", authority.sign))
        if agent._journal.seen.seq == 2:
            stop()

    join = Join("digits", "default", "device", tmp_path / "state", 15, device="porch")
    Hosted(join, broker.transport(), Screen(Console(as_json=True))).host(broker, server, script).run()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["run"] for one in said if one["event"] == "run"] == ["true"]
    assert any("not signed" in one["text"] for one in said if one["event"] == "warning")


def break_disk(agent):
    raise StateError("the disk is gone")


def break_protocol(agent):
    newer = {"v": 9, "online": True, "epoch": 1, "protocol_min": 8, "protocol_max": 9}
    agent.server.link.publish(TOPICS.server_state, json.dumps(newer).encode(), retain=True)


@pytest.mark.parametrize(("end", "error"), [(lambda agent: stop(), None), (break_disk, StateError), (break_protocol, ProtocolMismatch)])
def test_every_end_says_that_the_device_is_gone(host, end, error):
    def script(agent):
        if agent.server.greeted:
            end(agent)

    agent = host(script)
    with pytest.raises(error) if error else contextlib.nullcontext():
        agent.run()
    retained = agent.broker.retained[TOPICS.from_device(agent._journal.device, "state")]
    assert messages.decode(State, retained).state == "stopped"


@pytest.mark.parametrize(("measured_mb", "beside_mb", "words"), [(None, 80, "80 MB at least"), (250.0, 250, "250 MB with torch")])
def test_a_budget_below_what_torch_takes_by_itself_is_refused_before_a_process_is_started(monkeypatch, measured_mb, beside_mb, words):
    monkeypatch.setattr("lwfed.edge_agent.agent.share_mb", lambda: 50.0)
    least = 50 + beside_mb
    with pytest.raises(ConfigError, match=rf"agent takes 50 MB here, .* {words}.*give it more than {least} MB"):
        check_budget(least, measured_mb)
    check_budget(least + 1, measured_mb)


def test_what_an_agent_has_measured_holds_from_its_next_start_on(tmp_path):
    journal = Journal(tmp_path / JOURNAL)
    journal.note_baseline(torch_version(), 5000.0)
    journal.close()
    with pytest.raises(ConfigError, match="its training process 5000 MB with torch"):
        Agent(Join("digits", "default", "tester", tmp_path, 15, budget_mb=600.0), MemoryBroker().transport(), Screen(Console()))


def test_data_is_checked_before_anything_else(host, tmp_path):
    with pytest.raises(DataError):
        host(None, data=str(tmp_path / "nothing"))


def test_the_control_process_is_small_and_imports_neither_torch_nor_numpy():
    script = (
        "import sys, psutil; import lwfed.edge_agent.agent, lwfed.edge_agent.cli, lwfed.transport.mqtt;"
        "print(psutil.Process().memory_info().rss / 1e6, [m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    size, modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split(maxsplit=1)
    assert modules == "[]\n"
    assert float(size) < 60


def test_the_training_process_imports_no_more_than_it_needs(tmp_path):
    for part, data in weights(CONFIG, 1).items():
        (tmp_path / part).write_bytes(data)
    (tmp_path / "config").write_bytes(CONFIG.to_bytes())
    files = {name: str(tmp_path / name) for name in ("config", "kept", "out")}
    place = {"stage": 1, "round": 1, "participant": 0, "after": None, "lr_scale": 1.0}
    order = {
        **files,
        **place,
        "parts": {part: str(tmp_path / part) for part in CONFIG.plan(1).present},
        "graphs": {},
        "data": "digits",
        "shared": False,
        "execution": None,
        "budget_mb": None,
    }
    script = (
        f"import sys; from lwfed.edge_agent.worker import Worker; Worker().handle({order!r}, lambda data: None);"
        "print([m for m in ('torchvision', 'timm', 'torch._dynamo', 'sklearn') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
