"""What befalls a device in months of service: it goes on, or ends with what a service may start again."""

import errno
import io
import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from lwfed.child import Ended
from lwfed.config import load_config
from lwfed.console import Console
from lwfed.edge_agent import process, screen
from lwfed.edge_agent.agent import Agent
from lwfed.edge_agent.events import EndWorker, Show, StartWorker, Tell, Train, WorkerError, WorkerReady
from lwfed.edge_agent.screen import Screen
from lwfed.errors import DiskTrouble, ProtocolMismatch, TransportError
from lwfed.transport.memory import MemoryTransport
from lwfed.transport.packets import publish_bytes
from lwfed.wire.messages import Fail, Offer
from lwfed.wire.topics import UpdateChunk

from .conftest import TOPICS


def test_a_full_disk_does_not_end_a_device_that_only_counts_its_traffic(world):
    server, device = world.joined()
    server.announce()
    world.settle()
    before = device.journal.traffic("demo")
    database = device.journal._facts._db
    database.execute("CREATE TEMP TRIGGER full BEFORE INSERT ON main.facts BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END")
    device.link.received_bytes += 100_000
    world.settle(10)
    assert device.exit is None
    assert device.journal.traffic("demo") == before
    database.execute("DROP TRIGGER full")
    world.settle(10)
    assert device.journal.traffic("demo").down >= before.down + 100_000


def test_the_last_will_of_a_server_of_another_version_ends_nobody(world):
    device = world.start_device()
    other = {"epoch": 1, "protocol_min": 2, "protocol_max": 2}
    neighbour = world.broker.transport()
    neighbour.open("neighbour", None, lambda event: None)
    neighbour.publish(TOPICS.server_state, json.dumps({"online": False, **other}).encode(), retain=True)
    world.settle()
    assert device.exit is None
    neighbour.publish(TOPICS.server_state, json.dumps({"online": True, **other}).encode(), retain=True)
    world.settle()
    assert isinstance(device.exit.error, ProtocolMismatch)


class Limited(MemoryTransport):
    """To a broker that somebody has told to take no larger packets."""

    packet_limit = 40_000

    def publish(self, topic, payload, *, retain=False):
        if self.connected and publish_bytes(topic, payload, True) > self.packet_limit:
            raise TransportError("too large")
        super().publish(topic, payload, retain=retain)


def handing_over(world, size):
    """A device that was killed with an update in hand, cut in pieces of 100 kB; the next one finds a broker that takes 40 kB."""
    server, device = world.training(config=load_config("demo", ["transfer.chunk_bytes=100000", "worker.linger_s=60"]))
    server.answers = False
    device.finish(os.urandom(size))
    world.settle()
    assert device.journal.update.chunk_bytes == 100_000
    device.kill()
    server.answers = True
    server.heard.clear()
    return server


def test_an_update_is_cut_anew_for_a_broker_that_takes_smaller_packets(world, monkeypatch):
    server = handing_over(world, 90_000)
    monkeypatch.setattr(world.broker, "transport", lambda: Limited(world.broker))
    device = world.start_device()
    world.settle(10)
    assert server.of(Offer)[-1].manifest.chunk_bytes < 40_000
    assert len(server.received) == 1
    assert device.journal.update is None


def test_an_update_that_no_packets_can_carry_any_more_bars_no_later_round(world, monkeypatch):
    server = handing_over(world, 90_000)
    monkeypatch.setattr(Limited, "packet_limit", 2_000)
    monkeypatch.setattr(world.broker, "transport", lambda: Limited(world.broker))
    device = world.start_device()
    world.settle(10)
    assert any("is dropped: the update cannot be handed over" in text for text in device.texts("warning"))
    assert device.journal.update is None
    assert device.exit is None
    assert server.received == []


@pytest.mark.parametrize("method", ["open", "read_bytes"])
def test_a_disk_that_fails_once_ends_a_device_so_that_it_is_started_again(world, monkeypatch, method):
    server, device = world.joined()
    real = getattr(Path, method)

    def broken(path, *args, **options):
        if path.is_relative_to(device.root / "model") and args in ((), ("rb",)):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *args, **options)

    server.announce()
    server.assign(device.id)
    monkeypatch.setattr(Path, method, broken)
    with pytest.raises(DiskTrouble, match="check free space and permissions"):
        world.settle(5)


def test_a_part_that_is_lost_while_the_worker_starts_is_fetched_again(world):
    server, device = world.joined()
    server.announce()
    server.assign(device.id)
    world.settle(2)
    assert isinstance(device.worker[-1], StartWorker)
    a_part(device, server).unlink()
    device.ready()
    world.settle(2)
    assert [type(effect) for effect in device.worker] == [StartWorker, Train]
    assert sum("it is fetched again" in text for text in device.texts("warning")) == 1


def a_part(device, server):
    return next(path for path in (device.root / "model").iterdir() if path.is_file() and path.name != server.config.id)


def test_a_worker_that_waits_for_what_was_lost_ends_with_its_round(world):
    server, device = world.joined()
    server.announce()
    server.assign(device.id)
    world.settle(2)
    a_part(device, server).unlink()
    server.answers = False
    device.ready()
    world.settle()
    server.announce(phase="aggregating")
    world.settle()
    assert [type(effect) for effect in device.worker] == [StartWorker, EndWorker]


@pytest.mark.parametrize("what", ["config", "part"])
def test_a_file_that_is_lost_while_an_update_is_handed_over_is_fetched_again(world, what):
    server, device = world.training()
    refusing, server.inbox.offer = server.inbox.offer, lambda *_: []
    device.finish()
    world.settle()
    server.announce(round=2, content=b"changed" * 1000)
    server.assign(device.id, round=2)
    world.settle(5)
    assert device.journal.update is not None
    (a_part(device, server) if what == "part" else device.root / "model" / server.config.id).unlink()
    server.inbox.offer = refusing
    world.settle(60)
    assert device.journal.update is None
    assert [type(effect) for effect in device.worker] == [StartWorker, Train, Train]


class Shell(Agent):
    """What executes effects, alone."""

    def __init__(self, queue):
        self._queue, self._process = queue, None


def test_a_training_process_that_the_system_cannot_start_fails_the_round_and_nothing_else(world, monkeypatch):
    server, device = world.joined()
    server.announce()
    server.assign(device.id)
    world.settle(2)
    heard = []

    def none_left(*_, **__):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", none_left)
    Shell(type("Queue", (), {"put": heard.append}))._execute([device.worker[-1]])
    assert heard == [WorkerError("exit", "a process of its own cannot be started: Resource temporarily unavailable")]
    device.queue += heard
    world.settle()
    (fail,) = server.of(Fail)
    assert (fail.code, fail.reason) == ("worker", heard[0].message)
    server.announce(round=2)
    server.assign(device.id, round=2)
    world.settle(2)
    assert [type(effect) for effect in device.worker] == [StartWorker, StartWorker]


def test_a_process_that_ends_as_it_becomes_ready_leaves_no_baseline(monkeypatch, tmp_path):
    """Which would let budgets pass that nothing fits into."""
    said = []
    gone = process.TrainingProcess(said.append, 1)
    gone._child.kill()
    gone._child.close()
    assert isinstance(said[-1], Ended)
    ready = gone._translate({"event": "ready", "torch": "2", "machine": "m", "onnxruntime": None, "accelerator": None})
    noted = []
    shell = Shell(None)
    shell._process, shell._journal = gone, type("Journal", (), {"note_baseline": lambda *words: noted.append(words)})
    monkeypatch.setattr(gone, "hear", lambda _: ready)
    assert shell._translate(process.Said(gone._child, {})) is ready
    assert isinstance(ready, WorkerReady)
    assert noted == []


# Where nobody listens


def test_lines_that_nobody_can_read_are_lost_and_nothing_else(monkeypatch):
    lost, errors = [], [BrokenPipeError(), OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "gone"), None]

    def echo(line):
        lost.append(line)
        if (error := errors.pop(0)) is not None:
            raise error

    monkeypatch.setattr("click.echo", echo)
    shown = Screen(Console())
    for number in range(4):
        shown.tell(Tell("training", f"epoch {number}"))
    assert [line.split()[-1] for line in lost] == ["0", "1", "2", "3"], "each is tried, for somebody may listen again"


def test_a_terminal_that_goes_away_takes_its_bar_with_it(monkeypatch):
    ours, theirs = pty.openpty()
    with io.TextIOWrapper(io.FileIO(theirs, "w"), write_through=True) as terminal:
        monkeypatch.setattr(screen.sys, "stdout", terminal)
        shown = Screen(Console())
        shown.show(Show("receiving the model", 1, 9))
        os.close(ours)
        for done in range(2, 10):
            shown.show(Show("receiving the model", done, 9))
        shown.tell(Tell("download", "received"))
        shown.end_bar()
        assert not shown._with_bar


def test_without_stdout_there_is_no_bar(monkeypatch):
    monkeypatch.setattr(screen.sys, "stdout", None)
    shown = Screen(Console())
    shown.show(Show("receiving the model", 1, 9))
    assert shown._bar is None


@pytest.mark.parametrize("harm", ["rotten", "shorter", "gone"])
def test_an_update_that_rots_while_it_is_handed_over_is_dropped_and_nothing_of_it_sent(world, harm):
    server, device = world.training()
    server.answers = False
    device.finish()
    world.settle()
    path = device.root / "updates" / device.journal.update.blob.id
    data = path.read_bytes()
    path.unlink()
    if harm != "gone":
        path.write_bytes(data[:100] if harm == "shorter" else bytes([data[0] ^ 1]) + data[1:])
    world.broker.log.clear()
    server.answers = True
    world.settle(10)
    chunks = [topic for _, topic, _ in world.broker.log if isinstance(TOPICS.parse(topic), UpdateChunk)]
    assert chunks == []
    assert device.texts("warning")[-1].endswith("was damaged on disk; it is made again if the server asks")
    assert (device.exit, device.journal.update, device.session._work.busy) == (None, None, False)
    assert [path.name for path in (device.root / "updates").iterdir()] == ["parts"]
    server.assign(device.id)
    world.settle()
    assert isinstance(device.worker[-1], Train)


def test_an_update_that_has_rotted_when_it_is_to_be_cut_anew_is_dropped(world, monkeypatch):
    handing_over(world, 90_000)
    monkeypatch.setattr(world.broker, "transport", lambda: Limited(world.broker))
    device = world.start_device()
    path = device.root / "updates" / device.journal.update.blob.id
    path.write_bytes(bytes(path.stat().st_size))
    world.settle(10)
    assert (device.exit, device.journal.update) == (None, None)
    assert "was damaged on disk" in device.texts("warning")[-1]
