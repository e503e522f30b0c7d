"""The server and a broker that is not there, dies, refuses, or carries little."""

import pytest

from lwfed.errors import ConfigError, PortInUse, Refused, Unreachable
from lwfed.transport.base import Disconnected
from lwfed.transport.memory import MemoryTransport
from lwfed.wire import messages

from .fleets import of


def test_a_broker_that_dies_is_started_again_and_the_run_goes_on(world, said):
    fleet = world()
    fleet.start(revive=lambda: fleet.broker.start() or "it was started again")
    for name in ("a", "b"):
        fleet.join(name)
    fleet.settle(until=lambda: fleet.course.state.phase == "training")
    fleet.broker.stop()
    fleet.finish()
    assert "started again" in of(said, "warning")[0]["text"]


def test_a_broker_that_refuses_us_ends_the_server_before_it_begins(world, said):
    fleet = world()
    fleet.start()
    with pytest.raises(Refused, match="bad password"):
        fleet.server.handle(Disconnected(Refused("bad password")))
    assert fleet.jobs == []
    assert said == []


def test_the_reason_why_no_broker_was_reached_is_told(world, said):
    fleet = world()
    fleet.broker.stop()
    fleet.start()
    for _ in range(2):
        fleet.server.handle(Disconnected(PortInUse("is the port right?")))
    assert [one["text"].split(maxsplit=1)[1] for one in said] == ["no connection, trying for 15 s: is the port right?"]
    assert fleet.server.next_wakeup(fleet.now) == 15.0
    fleet.now = 15.0
    with pytest.raises(PortInUse, match=r"no connection within 15 s: is the port right\?"):
        fleet.server.handle(None)
    assert fleet.jobs == []


def test_nothing_is_prepared_nor_anybody_called_before_the_broker_is_there(world, said):
    fleet = world()
    fleet.broker.stop()
    fleet.start()
    fleet.quiet()
    fleet.server.handle(Disconnected(Unreachable("is it running?")))
    assert fleet.jobs == []
    assert of(said, "waiting") == []
    fleet.now = 5.0
    fleet.broker.start()
    fleet.quiet()
    assert of(said, "doing")[0]["text"].endswith("connected")
    assert fleet.jobs == ["prepare", "evaluate"]
    assert "edge-agent join" in of(said, "waiting")[-1]["text"]


def test_blobs_are_cut_for_what_the_broker_takes(world, monkeypatch):
    monkeypatch.setattr(MemoryTransport, "packet_limit", 20_000)
    fleet = world("transfer.chunk_bytes=122880", "ssl.hidden_dim=512", "rounds.min_devices=1")
    fleet.start()
    fleet.join("a")
    fleet.finish()
    manifests = [messages.decode(messages.Manifest, payload) for _, topic, payload in fleet.broker.log if topic.endswith("dn/manifest")]
    assert {manifest.chunk_bytes for manifest in manifests} == {20_000 - 512}
    assert max(len(manifest.digests) for manifest in manifests) > 1


@pytest.mark.parametrize("limit", [512, 1400, 8000])
def test_a_broker_that_takes_too_small_packets_is_found_before_anybody_trains(world, monkeypatch, limit):
    monkeypatch.setattr(MemoryTransport, "packet_limit", limit)
    fleet = world()
    fleet.start()
    for _ in range(2):  # a second start is no way around it
        with pytest.raises(ConfigError, match=rf"takes packets of {limit} bytes at most.* raise its limit .* to \d+"):
            fleet.quiet()
        assert fleet.course.state.phase == "preparing"
        fleet.kill()
        fleet.start()
