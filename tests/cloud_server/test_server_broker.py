"""The server and a broker that is not there, dies, refuses, or carries little."""

import json

import pytest

from lwfed.cloud_server.authority import Authority
from lwfed.cloud_server.enrolment import invite
from lwfed.cloud_server.gate import HEED_S, Gate, Place
from lwfed.cloud_server.registry import Registry
from lwfed.errors import ConfigError, PortInUse, Refused, TransportError, Unreachable
from lwfed.transport.base import Disconnected
from lwfed.transport.memory import MemoryTransport
from lwfed.transport.packets import publish_bytes
from lwfed.wire import messages
from lwfed.wire.commands import Send

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


@pytest.mark.parametrize("times", [1, 2])
def test_a_broker_that_does_not_confirm_a_revocation_is_killed_and_started_again(world, said, tmp_path, times):
    """Also that of a device which was enrolled again, and has another name at the broker."""
    fleet, gate, registry, killed = world(), Gate(tmp_path, Place("localhost", 8883), "default"), Registry(tmp_path), []
    gate.advertise()
    fleet.start(gate=gate, kill_broker=lambda why: killed.append(fleet.now))
    for _ in range(times):
        registry.certify(invite(Authority(tmp_path), registry, "a").header.id, "request", "certificate")
    fleet.now += 1.1
    fleet.quiet()
    registry.revoke("a")
    revoked_at = fleet.now
    fleet.settle(until=lambda: killed)
    assert killed[0] - revoked_at <= HEED_S + 1.1
    (tmp_path / "broker").mkdir()
    gate.configure(tmp_path / "broker")  # as the broker that is started then does
    fleet.now += 10 * HEED_S
    fleet.quiet()
    assert len(killed) == 1
    registry.close()
    gate.close()


def test_a_broker_that_confirms_one_revocation_after_the_other_is_left_alone(tmp_path):
    gate, registry = Gate(tmp_path, Place("localhost", 8883), "default"), Registry(tmp_path)
    gate.advertise()
    names = [f"d{number}" for number in range(8)]
    for name in names:
        registry.certify(invite(Authority(tmp_path), registry, name).header.id, "request", "certificate")
    (tmp_path / "broker").mkdir()
    gate.configure(tmp_path / "broker")
    for second, name in enumerate(names):
        registry.revoke(name)
        asked = [json.loads(one.payload) for one in gate.poll(float(second)) if isinstance(one, Send)]
        done = [{"command": one["command"], "correlationData": one["correlationData"]} for found in asked for one in found["commands"]]
        assert done
        gate.on_answer(json.dumps({"responses": done}).encode())
        assert not gate.take_unheeded(float(second))
    assert gate.revoked == set(names)
    registry.close()
    gate.close()


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


class Strict(MemoryTransport):
    """To a broker that takes no larger packets than it says, as `MqttTransport` has it."""

    packet_limit = 14_500

    def publish(self, topic, payload, *, retain=False):
        if publish_bytes(topic, payload, version5=True) > self.packet_limit:
            raise TransportError("a message that the broker does not take")
        super().publish(topic, payload, retain=retain)


def test_patches_for_which_an_announcement_has_no_room_are_left_out_of_it(world, monkeypatch):
    deep = ("model.depth=24", "stages.layers_per_stage=24", "stages.rounds_per_stage=4")
    fleet = world("transfer.codec=int8", "transfer.chunk_bytes=8192", "rounds.min_devices=1", *deep)
    monkeypatch.setattr(fleet.broker, "transport", lambda: Strict(fleet.broker))
    fleet.start()
    fleet.join("a")
    fleet.finish()
    sizes = [len(payload) for _, topic, payload in fleet.broker.log if topic.endswith("all/run")]
    assert 13_000 < max(sizes) < 14_500


def test_a_broker_that_takes_no_announcement_of_the_run_ends_the_server_when_it_connects(world, monkeypatch):
    monkeypatch.setattr(MemoryTransport, "packet_limit", 7_000)
    fleet = world("model.depth=64", "stages.layers_per_stage=64", "transfer.chunk_bytes=16384")
    fleet.start()
    with pytest.raises(ConfigError, match=r"announcement: the broker takes packets of 7000 bytes at most; .* to \d+$") as raised:
        fleet.quiet()
    assert fleet.jobs == []
    monkeypatch.setattr(MemoryTransport, "packet_limit", int(str(raised.value).split()[-1]))
    fleet.kill()
    fleet.start()
    fleet.quiet()
    assert fleet.jobs != []
