"""The broker that a server starts for itself: mosquitto where it is installed, or the embedded one.

It listens on loopback only, unless a gate says who may come in from elsewhere; the embedded one never does.

It runs as a child process and ends with the server, even when that is killed. `ensure` starts it again when it died, or was
ended because it took too much memory.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from lwfed.cloud_server import tethered
from lwfed.cloud_server.gate import Gate
from lwfed.cloud_server.watch import Watch
from lwfed.errors import MissingDependency, PortInUse, StateError, TransportError, Unreachable
from lwfed.transport.address import BrokerAddress
from lwfed.wire.messages import MAX_MESSAGE_BYTES
from lwfed.wire.upload import PACKET_MARGIN_BYTES

Kind = Literal["auto", "mosquitto", "embedded"]
HOST = "127.0.0.1"
RELEASE_S = 2.0  # an earlier server's broker needs a moment to let its port go
START_S = 20.0
STEP_S = 0.02
MOSQUITTO_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")

CONFIGURATION = """\
# Written by cloud-server at every start; changes are lost.
# A chunk or a message, and its topic: what one device may send must stay small.
max_packet_size {packet_bytes}
# Messages beyond this are dropped although their publisher got an acknowledgement; 0 would be without bound.
max_queued_messages 2000
# Of these so many are on their way to a client, each in a copy of its own.
max_inflight_messages 20
# Nothing is kept on disk: both sides say again what a broker forgets.
# No memory_limit: 2.0 miscounts what its plugin frees and then lets nobody in.
log_dest stderr
log_type error
log_type warning
"""
FOR_THIS_MACHINE = "listener {port} {host}\nallow_anonymous true\n"


class ManagedBroker:
    """A broker as our child. Nothing runs before `start`."""

    def __init__(
        self,
        kind: Kind,
        port: int,
        folder: Path,
        chunk_bytes: int,
        gate: Gate | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`port` on loopback, where 0 takes a free one, unless there is a `gate`; `folder` keeps configuration and log.

        mosquitto takes no larger messages than those of the protocol with such chunks. Raises MissingDependency.
        """
        self.kind = _resolve("mosquitto" if gate else kind)
        self._port = port
        self._gate = gate
        self._folder = folder
        self._packet_bytes = max(chunk_bytes, MAX_MESSAGE_BYTES) + PACKET_MARGIN_BYTES
        self._sleep = sleep
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: Watch | None = None
        self._wanted = False
        self._killed = ""  # why

    @property
    def address(self) -> BrokerAddress:
        return self._gate.address if self._gate else BrokerAddress(HOST, self._port)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Returns when it accepts connections. Raises PortInUse, StateError, and Unreachable with what it said."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._gate is None:
                self._port = self._reserve(HOST, self._port)
            else:
                for port in self._gate.place.ports:
                    self._reserve(self._gate.place.bind, port)
            program = self._mosquitto() if self.kind == "mosquitto" else self._embedded()
            self._log.write_bytes(b"")
            with self._log.open("ab") as log:  # which `Watch` cuts
                self._process = subprocess.Popen(
                    tethered.command(program), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            raise StateError(f"cannot start the broker in {self._folder}: {error.strerror or error}") from error
        self._await()
        self._watch = Watch(self._process, self._log)
        self._watch.start()
        self._wanted = True

    def ensure(self) -> str:
        """Start it again if it has died, or could not be started again; what happened then, or nothing. Raises as `start`."""
        if not self._wanted or (self._process is not None and self._process.poll() is None):
            return ""
        why, self._killed = self._killed or (self._watch.excess if self._watch else ""), ""
        self.start()
        return f"the broker {why or 'had died and'} was started again"

    def kill(self, why: str) -> None:
        """End it at once, to be started again by `ensure`, which says `why`."""
        if self._process is not None:
            self._killed = why
            self._process.kill()
            self._end()

    def close(self) -> None:
        """End it; idempotent."""
        self._wanted = False
        self._end()
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    @property
    def _log(self) -> Path:
        return self._folder / "broker.log"

    def _mosquitto(self) -> list[str]:
        text = CONFIGURATION.format(packet_bytes=self._packet_bytes)
        text += self._gate.configure(self._folder) if self._gate else FOR_THIS_MACHINE.format(port=self._port, host=HOST)
        if os.geteuid() == 0:
            text += "# Otherwise it drops to a user of its own, who may not write here.\nuser root\n"
        path = self._folder / "mosquitto.conf"
        path.write_text(text)
        return [str(find_mosquitto()), "-c", str(path)]

    def _embedded(self) -> list[str]:
        return [sys.executable, "-m", "lwfed.cloud_server.embedded", HOST, str(self._port)]

    def _reserve(self, host: str, port: int) -> int:
        """The port, free at this moment."""
        until = time.monotonic() + RELEASE_S
        while True:
            try:
                with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((host, port))
                    return int(probe.getsockname()[1])
            except OSError as error:
                if time.monotonic() >= until:
                    raise _port_error(host, port, error) from None
            self._sleep(STEP_S)

    def _await(self) -> None:
        assert self._process is not None
        until = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < until:
            try:
                with socket.create_connection((self.address.host, self.address.port), timeout=1):
                    return
            except OSError:
                self._sleep(STEP_S)
        code = self._process.poll()
        self._end()
        said = self._log.read_text(errors="replace").strip().splitlines()[-5:]
        what = "did not answer" if code is None else f"ended with code {code}"
        raise Unreachable("\n  ".join([f"the {self.kind} broker {what} at {self.address}; it said:", *(said or ["nothing"])]))


def find_mosquitto() -> Path | None:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *MOSQUITTO_FOLDERS])
    found = shutil.which("mosquitto", path=path)
    return Path(found) if found else None


def _resolve(kind: Kind) -> Literal["mosquitto", "embedded"]:
    if kind in ("auto", "mosquitto") and find_mosquitto():
        return "mosquitto"
    if kind == "mosquitto":
        raise MissingDependency("mosquitto is not installed: `apt install mosquitto`, or --broker embedded, or --broker mqtt://host")
    if importlib.util.find_spec("amqtt") is None:
        raise MissingDependency("no broker here: `apt install mosquitto`, or `pip install 'lwfed[server]'`, or --broker mqtt://host")
    return "embedded"


def _port_error(host: str, port: int, error: OSError) -> TransportError:
    if isinstance(error, PermissionError):
        return Unreachable(f"port {port} needs more permissions than this user has: choose one above 1023")
    if error.errno == errno.EADDRNOTAVAIL:
        return Unreachable(f"{host} is no address of this machine: give --listen one, or the name that devices reach it by")
    if error.errno != errno.EADDRINUSE:
        return Unreachable(f"cannot listen on {host or 'this machine'}:{port}: {error.strerror or error}")
    mine = f", or use that broker with --broker mqtt://{HOST}:{port}" if host == HOST else ""
    return PortInUse(
        f"something else listens on {host or 'this machine'}:{port}: choose another port with --port (0 takes a free one), "
        f"or behind the HOST of --listen{mine}"
    )
