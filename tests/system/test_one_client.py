"""A run with one device is local training, bit for bit: production server and agent, each with its worker, in this process.

What it is compared with knows no rounds, parts, blobs or messages: local calls in a loop, each on what the last one left.
"""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lwfed.cloud_server.worker as server_worker
import lwfed.edge_agent.worker as agent_worker
from lwfed.child import Said
from lwfed.config import load_config
from lwfed.data.load import auxiliary_images, device_images
from lwfed.edge_agent import events
from lwfed.models.initial import grow
from lwfed.models.local import calibration_task, device_task, train_local
from lwfed.plan import HEADS, part_of
from lwfed.seeds import derive
from lwfed.transport.memory import MemoryBroker
from lwfed.wire.report import Memory

from ..cloud_server import world as server_side
from ..edge_agent import conftest as agent_side

SMALL = [
    "model={image_size: 8, width: 16, depth: 3, heads: 2}", "ssl={hidden_dim: 16, output_dim: 8, decoder_width: 32}",
    "stages.rounds_per_stage=2", "train={epochs: 2, batch_size: 12}", "rounds.min_devices=1",
    "data={partition: even, devices: 100, auxiliary_share: 0.02}", "calibration={every: never}", "evaluation.data=null",
]  # fmt: skip
CALIBRATED = "calibration={data: digits, epochs: 1, batch_size: 16}"
RESNET = ["model.backbone=resnet18", "model.image_size=16", "stages={layers_per_stage: [1, 2, 1], rounds_per_stage: [1, 2, 1]}"]
MOBILENET = ["model.backbone=mobilenetv3_small_100", "model.image_size=16", "stages={layers_per_stage: 3, rounds_per_stage: 1}"]


class InProcess:
    """The server's worker without a process."""

    def __init__(self, deliver, jobs):
        self._deliver, self._worker = deliver, server_worker.Worker()

    def send(self, job):
        self._worker.handle(job, lambda said: self._deliver(Said(self, said)))

    def kill(self):
        pass

    close = kill


class Device(agent_side.Device):
    """Session, work and journal of an agent; its worker without a process."""

    def __init__(self, *where):
        self.announced = {}  # (stage, round) -> part -> blob
        super().__init__(*where)

    def poll(self, now):
        self.step(now)
        while self.worker:
            match self.worker.pop(0):
                case events.StartWorker():
                    self._process = agent_worker.Worker()
                    self.ready()
                case events.Train(order):
                    blobs = {part: Path(file).name for part, file in order["parts"].items()}
                    self.announced[order["stage"], order["round"]] = blobs
                    self._process.handle(dict(order), self._say)

    def planned(self, order):
        """The worker says that itself."""

    def _say(self, said):
        if said["event"] == "planned":
            self.queue.append(events.WorkerPlanned(**{name: value for name, value in said.items() if name != "event"}))
        if said["event"] == "done":
            memory = Memory(baseline_mb=200, peak_mb=300, peak_source="VmHWM", curve=())
            told = {name: value for name, value in said.items() if name not in ("event", "accelerator")}
            done = {**told, "file": Path(said["file"]), "losses": tuple(said["losses"])}
            self.queue.append(events.WorkerDone(**done, memory=memory))

    def next_wakeup(self, now):
        return now if self.queue or self.worker else self.session.next_wakeup(now)


unmeasured = agent_side.unmeasured
pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def federated(config, root):
    """What the device was sent, round by round; the last tensors; and the encoder."""
    (root / "server").mkdir()
    world = server_side.World(root, config, MemoryBroker())
    world.start()
    world.devices.append(Device(world.broker, root / "device", world.now))
    try:
        world.settle(until=lambda: world.course.state.phase == "finished", limit=3000)
        last: dict[str, torch.Tensor] = {}
        for blob in world.course.state.parts.values():
            last |= load_file(world.course.blobs.path(blob))
        return world.devices[0].announced, last, load_file(world.course.encoder_path)
    finally:
        world.course.store.close()
        world.devices[0].journal.close()


def alone(config, kept):
    """The same, by local calls in a loop."""
    images = device_images("digits", config, 0, kept).pixels
    auxiliary = auxiliary_images(config, kept).pixels if config.calibration.every != "never" else None
    tensors: dict[str, torch.Tensor] = {}
    for stage, rounds in enumerate(config.round_counts, 1):
        plan, previous = config.plan(stage), None
        tensors |= grow(config, plan, tensors)
        tensors = {name: tensor for name, tensor in tensors.items() if part_of(name) in plan.present}
        for round in range(1, rounds + 1):
            place = config.place(stage, round)
            task = device_task(config, plan, derive(config.run.seed, "local", 0, stage, round), place)
            previous, _ = train_local(config, task, tensors, images, previous=previous)
            tensors |= previous
            if config.calibration.every == "round" or (config.calibration.every == "stage" and round == rounds):
                task = calibration_task(config, plan, derive(config.run.seed, "calibrate", stage, round), place)
                tensors |= train_local(config, task, tensors, auxiliary)[0]
    return tensors


def digest(tensors):
    return {name: (tuple(tensor.shape), tensor.numpy().tobytes()) for name, tensor in sorted(tensors.items())}


@pytest.mark.parametrize(
    "settings",
    [
        ["ssl.method=moco_v3"],
        ["ssl.method=simclr", "stages={layers_per_stage: 2, layer_init: copy, depth_dropout: 0.5}"],
        ["ssl.method=byol", "stages={overlap: 1, layers_per_stage: [1, 1, 1], rounds_per_stage: [1, 2, 1]}", "train.micro_batch=5"],
        ["ssl.method=mae", "stages.strategy=progressive"],
        ["ssl.method=simclr", "stages.strategy=end_to_end", "train.proximal=0.1"],
        ["alignment.method=moon", "stages.rounds_per_stage=3"],
        ["ssl.method=mae", "alignment.method=cosine", CALIBRATED, "calibration.every=round", "calibration.scope=active"],
        ["ssl.method=byol", CALIBRATED, "calibration.every=stage"],
        [*RESNET, "alignment.method=moon", "train.epochs=1", CALIBRATED, "calibration.every=stage"],
        [*MOBILENET, "stages.strategy=end_to_end", "train.epochs=1"],
    ],
    ids=lambda settings: "-".join(setting.rpartition("=")[2] for setting in settings),
)
def test_one_device_is_local_training(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(server_side, "NumpyWorker", InProcess)
    config = load_config("demo", [*SMALL, "transfer.codec=fp32", *settings])
    announced, found, encoder = federated(config, tmp_path)
    assert digest(found) == digest(alone(config, tmp_path / "kept"))
    assert digest(encoder) == digest({name: tensor for name, tensor in found.items() if part_of(name) not in HEADS[config.ssl.method]})
    assert list(announced) == [(stage, round) for stage, count in enumerate(config.round_counts, 1) for round in range(1, count + 1)]
    for (place, before), (following, after) in itertools.pairwise(announced.items()):
        plan, every = config.plan(place[0]), config.calibration.every
        calibrated = every == "round" or (every == "stage" and place[0] != following[0])
        both = before.keys() & after.keys()
        moved = {part for part in both if before[part] != after[part]}
        assert moved == both & {*plan.trained, *(plan.calibrated if calibrated else ())}, "what is frozen is the same bits"
