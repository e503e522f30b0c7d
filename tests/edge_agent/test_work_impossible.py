"""Tasks whose update could not travel, or that cannot be made out: their round fails, and the agent stays."""

import re

import pytest

from lwfed.config import load_config
from lwfed.edge_agent.events import StartWorker
from lwfed.wire import messages
from lwfed.wire.messages import Fail

from .conftest import state


def test_an_update_that_cannot_travel_fails_its_round_and_bars_no_start(world, monkeypatch):
    server, device = world.training()
    monkeypatch.setattr(type(device.link), "packet_limit", 1024)
    device.finish()
    world.settle()
    assert server.of(messages.Fail)[-1].code == "config"
    assert (device.journal.task, device.journal.update) == (None, None)
    assert [path.name for path in (device.root / "updates").iterdir()] == ["parts"]
    assert state(world).state == "ready"
    device.kill()
    again = world.start_device()
    world.settle()
    assert again.exit is None
    assert not again.texts("update")


@pytest.mark.parametrize("limit", [100, 1400, 13_700])
def test_a_broker_that_takes_too_small_packets_for_an_update_is_found_before_training(world, monkeypatch, limit):
    server, device = world.joined()
    monkeypatch.setattr(type(device.link), "packet_limit", limit)
    server.announce(content=b"weights" * 3000)
    server.assign(device.id)
    world.settle(2)
    assert device.worker == []
    fail = server.of(messages.Fail)[-1]
    assert fail.code == "config"
    assert re.search(rf"takes packets of {limit} bytes at most; raise its limit .* to \d+$", fail.reason)
    monkeypatch.setattr(type(device.link), "packet_limit", int(fail.reason.split()[-1]))
    server.assign(device.id)
    world.settle(2)
    assert device.worker == [StartWorker(1)]


@pytest.mark.parametrize(("codec", "trains"), [("fp32", False), ("bf16", False), ("int8", True)])
def test_whether_an_update_can_travel_is_judged_by_what_its_codec_can_make_of_it(world, monkeypatch, codec, trains):
    """140 kB, 70 kB and 36 kB, whose offer takes 22.7 kB, 18.2 kB and 15.9 kB."""
    config = load_config("demo", ["transfer.chunk_bytes=1024", f"transfer.codec={codec}"])
    server, device = world.start_server(config=config), world.start_device()
    monkeypatch.setattr(type(device.link), "packet_limit", 17_000)
    world.settle(0.2)
    server.announce(content=b"weights" * 4000)
    server.assign(device.id)
    world.settle(2)
    assert bool(device.worker) == trains
    assert [fail.code for fail in server.of(Fail)] == [] if trains else ["config"]


def test_a_part_whose_file_states_no_shapes_fails_the_round(world):
    server, device = world.joined()
    server.announce(
        parts={part: server.store.put(part.encode() + b"junk" * 9) for part in ("stem", "layer.1", "norm", "projector", "predictor")}
    )
    server.assign(device.id)
    world.settle(2)
    fail = server.of(messages.Fail)[-1]
    assert (fail.code, device.worker) == ("worker", [])
    assert "header" in fail.reason


def test_a_stage_that_the_configuration_does_not_have_fails_its_round(world):
    server, device = world.joined()
    server.announce(stage=400)
    server.assign(device.id, stage=400)
    world.settle(2)
    assert (device.exit, server.of(messages.Fail)[-1].code) == (None, "config")
