"""How a device comes by parts of which differences are offered: by patches to what it holds, else whole."""

import hashlib

import numpy as np
import pytest

from lwfed.config import load_config
from lwfed.edge_agent import differences
from lwfed.edge_agent.events import EndWorker, StartWorker, Train, WorkerError, WorkerPatched
from lwfed.edge_agent.previous import Turn
from lwfed.errors import Diverged, InvalidPayload
from lwfed.models.shapes import part_shapes
from lwfed.wire import deltas, tensors
from lwfed.wire.messages import Fail, Patch

from .conftest import part_file

PART = "layer.1"
OTHERS = ("stem", "norm", "projector", "predictor")
SMALL = ["model={image_size: 8, width: 8, heads: 2}", "ssl={hidden_dim: 8, output_dim: 8}"]


class Rounds:
    """What a server announces of one part that differs from round to round; the others stay."""

    def __init__(self, server, patch_bytes=500):
        self.server = server
        self.parts = [server.store.put(part_file(PART))]
        self.patches = []
        self.patch_bytes = patch_bytes

    def move(self):
        number = len(self.parts)
        self.patches.append(Patch(base=self.parts[-1].id, blob=self.server.store.put(b"%d" % number * self.patch_bytes)))
        self.parts.append(self.server.store.put(part_file(PART, b"%d" % number * 7000)))

    def announce(self, device):
        round = len(self.parts)
        whole = {part: self.server.store.put(part_file(part)) for part in OTHERS}
        self.server.announce(
            round=round, parts={**whole, PART: self.parts[-1]}, patches={PART: tuple(self.patches)} if self.patches else {}
        )
        self.server.assign(device.id, round=round)


@pytest.fixture
def trained(world):
    """A device that has trained in round 1 and holds its parts, and what follows."""
    server, device = world.training()
    device.finish()
    world.settle(2)
    return Rounds(server), device


def order(device):
    assert isinstance(device.worker[-1], Train)
    return device.worker[-1].order["parts"][PART]


def held(device, id):
    return str(device.root / "model" / id)


def make(world, rounds, device):
    """As the worker does with the patches it was given: the part is made, and taken away by the agent."""
    made = device.root / f"{PART}.patched"
    made.write_bytes(rounds.server.store.read(rounds.parts[-1].id))
    device.queue.append(WorkerPatched((made,)))
    world.settle(0.2)
    assert not made.exists()
    device.finish()
    world.settle(2)


def test_a_patch_is_fetched_in_place_of_the_part_whose_base_is_held(world, trained):
    rounds, device = trained
    for _ in range(2):  # the second from what the first has made
        rounds.move()
        chunks = rounds.server.broadcast.sent_chunks
        rounds.announce(device)
        world.settle(2)
        patch = rounds.patches[-1]
        assert rounds.server.broadcast.sent_chunks - chunks == 1
        assert order(device) == {"base": held(device, patch.base), "patches": [held(device, patch.blob.id)], "id": rounds.parts[-1].id}
        assert all(isinstance(device.worker[-1].order["parts"][part], str) for part in OTHERS)
        make(world, rounds, device)
    assert device.texts("download")[1:] == ["received 0.5 kB of the model"] * 2


def test_a_device_that_missed_a_round_follows_the_patches_in_between(world, trained):
    rounds, device = trained
    rounds.move()
    rounds.move()
    rounds.announce(device)
    world.settle(2)
    files = [held(device, patch.blob.id) for patch in rounds.patches]
    assert order(device) == {"base": held(device, rounds.parts[0].id), "patches": files, "id": rounds.parts[2].id}


@pytest.mark.parametrize("lost", ["base", "first patches"])
def test_without_a_base_the_part_is_fetched(world, trained, lost):
    rounds, device = trained
    rounds.move()
    rounds.move()
    if lost == "base":
        (device.root / "model" / rounds.parts[0].id).unlink()
    else:
        del rounds.patches[0]
    rounds.announce(device)
    world.settle(2)
    assert order(device) == held(device, rounds.parts[-1].id)


@pytest.mark.parametrize(("more", "patched"), [(-1, True), (1, False)])
def test_a_way_that_costs_more_than_the_part_is_not_taken(world, trained, more, patched):
    """In two patches, each of half the part's bytes and a little."""
    rounds, device = trained
    rounds.patch_bytes = rounds.parts[0].size // 2 + more
    rounds.move()
    rounds.move()
    rounds.announce(device)
    world.settle(2)
    assert isinstance(order(device), dict) == patched


def test_a_part_that_is_held_is_not_made_again(world, trained):
    rounds, device = trained
    rounds.move()
    rounds.announce(device)
    world.settle(2)
    make(world, rounds, device)
    device.kill()
    again = world.start_device()
    world.settle(1)
    rounds.server.broadcast.sent_chunks = 0
    rounds.move()
    rounds.parts.append(rounds.parts[1])  # as when a stage is repeated
    rounds.patches = [Patch(base=rounds.parts[2].id, blob=rounds.patches[0].blob)]
    rounds.announce(again)
    world.settle(2)
    again.ready()
    world.settle(0.2)
    assert order(again) == held(again, rounds.parts[1].id)
    assert rounds.server.broadcast.sent_chunks == 0


def test_patches_that_do_not_make_the_part_cost_its_download_and_not_the_round(world, trained):
    rounds, device = trained
    rounds.move()
    rounds.announce(device)
    world.settle(2)
    assert isinstance(order(device), dict)
    before = len(device.worker)
    device.queue.append(WorkerError("InvalidPayload", "what was sent of layer.1 does not make of it what the server announced"))
    world.settle(2)
    device.ready()
    world.settle(0.2)
    assert [type(effect) for effect in device.worker[before:]] == [EndWorker, StartWorker, Train]
    assert order(device) == held(device, rounds.parts[1].id)
    assert device.texts("warning")[-1].endswith("; the whole parts are fetched instead")
    device.finish()
    world.settle(2)
    assert len(rounds.server.received) == 2
    assert not rounds.server.of(Fail)


def test_whole_parts_that_do_not_fit_fail_the_round(world, trained):
    rounds, device = trained
    rounds.move()
    rounds.announce(device)
    world.settle(2)
    for _ in range(2):
        device.queue.append(WorkerError("InvalidPayload", "wrong shape"))
        world.settle(2)
        device.ready()
        world.settle(0.2)
    assert [fail.code for fail in rounds.server.of(Fail)] == ["worker"]


# In the worker


def config(codec="int8"):
    return load_config("demo", [*SMALL, f"transfer.codec={codec}"])


SHAPES = part_shapes(config(), PART)


def some(seed, scale=1.0):
    random = np.random.default_rng(seed)
    return {name: np.asarray(random.standard_normal(shape) * scale, np.float32) for name, shape in part_shapes(config(), PART).items()}


def files(folder, count=2):
    """A base, patches to it, and what they make of it."""
    found, patches = some(0), []
    (folder / "base").write_bytes(tensors.encode(found))
    for number in range(count):
        data = deltas.encode(some(number + 1, 0.01), "int8", 1.0, number).data
        patches.append(folder / f"patch-{number}")
        patches[-1].write_bytes(data)
        change = deltas.decode(data, part_shapes(config(), PART), "int8")
        found = {name: tensor + change[name] for name, tensor in found.items()}
    return folder / "base", patches, tensors.encode(found)


def test_patches_make_the_part_in_their_order_alone(tmp_path):
    base, patches, made = files(tmp_path)
    digest = hashlib.sha256(made).hexdigest()
    assert differences.patch(config(), PART, SHAPES, base, patches, digest) == made
    for wrong in (patches[:1], patches[1:], [*patches, patches[0]]):
        with pytest.raises(InvalidPayload, match=r"what was sent of layer\.1 does not make"):
            differences.patch(config(), PART, SHAPES, base, wrong, digest)
    with pytest.raises(InvalidPayload, match="fp32 sends no patches"):
        differences.patch(config("fp32"), PART, SHAPES, base, patches, digest)
    patches[0].write_bytes(b"junk")
    with pytest.raises(InvalidPayload, match="not a file of differences"):
        differences.patch(config(), PART, SHAPES, base, patches, digest)


def test_an_update_that_cannot_be_sent_ends_with_advice(tmp_path):
    received = some(0)
    update = {name: np.full_like(tensor, np.inf) for name, tensor in received.items()}
    with pytest.raises(Diverged, match=r"lower train\.lr"):
        differences.encode(config(), Turn(1, 1, 0, None), update, received, tmp_path, pytest.fail)
