"""Real processes for the system tests: started with ``--json``, watched through what they say."""

import contextlib
import functools
import hashlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

LONG_S = 300  # an upper bound for a loaded machine; nothing waits for it when all goes well
SMALL = [
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "ssl.hidden_dim=32",
    "ssl.output_dim=16",
    "stages.rounds_per_stage=2",
    "train.batch_size=64",
    "train.epochs=2",
    "rounds.min_devices=2",
    "data.devices=2",
    "evaluation.probe=false",
]

FEW_IMAGES = (  # each device has 55 of 8x8, the server a few more
    *("model.image_size=8", "data.partition=even", "data.devices=30", "data.auxiliary_share=0.02", "data.labelled_share=0.05"),
    *("train.batch_size=32", "calibration.epochs=1"),
)


class Program:
    """One of the console scripts as a process; `before` is the command that runs it, if any."""

    def __init__(self, name, *arguments, before=()):
        script = os.path.join(os.path.dirname(sys.executable), name)
        self.name = name
        self.said = []
        self._fresh = queue.Queue()
        self.process = subprocess.Popen(
            [*before, script, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
        self.errors = []
        self._threads = [threading.Thread(target=self._read_out), threading.Thread(target=self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read_out(self):
        for line in self.process.stdout:
            self._fresh.put(json.loads(line) if line.startswith("{") else {"event": "text", "text": line})
        self._fresh.put(None)

    def _read_errors(self):
        self.errors.extend(self.process.stderr)

    def wait_for(self, event, **fields):
        """The next event of that name with those fields; fails with what was said when the program ends first."""
        while True:
            said = self._fresh.get(timeout=LONG_S)
            if said is None:
                self._fresh.put(None)
                pytest.fail(f"{self.name} ended without saying {event} {fields}:\n{self.transcript()}")
            self.said.append(said)
            if _is(said, event, fields):
                return said

    def has_said(self, event, **fields):
        """Whether it has said that by now; `wait_for` looks at what comes later only."""
        return bool(self.all_said(event, **fields))

    def all_said(self, event, **fields):
        """Every event by now of that name with those fields."""
        with contextlib.suppress(queue.Empty):
            while (said := self._fresh.get_nowait()) is not None:
                self.said.append(said)
            self._fresh.put(None)
        return [said for said in self.said if _is(said, event, fields)]

    def transcript(self):
        return "\n".join([said["text"] for said in self.said] + self.errors)

    def end(self, how=signal.SIGTERM):
        """Send a signal, wait, and give the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(LONG_S)
        for thread in self._threads:
            thread.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return code

    def result(self):
        """Wait for its own end; the exit code."""
        self.process.wait(LONG_S)
        return self.end()


def _is(said, event, fields):
    return said["event"] == event and all(said.get(key) == value for key, value in fields.items())


@contextlib.contextmanager
def starting():
    """A function that starts programs, which end with the block."""
    programs = []

    def start(name, *arguments, **options):
        programs.append(Program(name, *arguments, **options))
        return programs[-1]

    try:
        yield start
    finally:
        for program in programs:
            program.end(signal.SIGKILL)


@pytest.fixture
def start():
    with starting() as start:
        yield start


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def port():
    return free_port()


class Fleet:
    """A server and its devices in one directory; each can be killed and started again.

    `way` leads a device's number to the port by which it reaches the broker.
    """

    def __init__(self, start, root, port, *, broker="embedded", settings=(), way=None, before=()):
        self._start, self.root, self.port, self._broker = start, root, port, broker
        self._way, self._before = way or (lambda number: port), before
        self._settings = [f"--set={setting}" for setting in (*SMALL, *settings)]

    def server(self):
        return self._start(
            "cloud-server", "serve", "--config", "demo", *self._settings, "--broker", self._broker, "--port", self.port,
            "--state", self.root / "server", "--until-done", "--json", before=self._before,
        )  # fmt: skip

    def device(self, number, data="digits"):
        return self._start(
            "edge-agent", "join", f"mqtt://127.0.0.1:{self._way(number)}", "--data", data, "--name", f"device-{number}",
            "--state", self.root / f"device-{number}", "--wait", 60, "--json", before=self._before,
        )  # fmt: skip

    def begin(self):
        """The server, and two devices that have joined it one after the other."""
        server = self.server()
        return server, self.join(server)

    def join(self, server):
        devices = []
        for number in (1, 2):
            devices.append(self.device(number))
            server.wait_for("device", participant=number - 1)
        return devices


@pytest.fixture
def fleet(start, tmp_path, port):
    def fleet(name="fleet", **options):
        return Fleet(start, tmp_path / name, port, **options)

    return fleet


def digest_of_result(server):
    path = Path(server.wait_for("finished")["encoder"])
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A function of settings: the outcome of their run, which is made once."""
    from lwfed.tools.links.proxy import Link

    from .runs import over

    @functools.cache
    def outcome(settings):
        with starting() as start:
            return over(Link(), start, tmp_path_factory.mktemp("undisturbed"), settings)

    return outcome
