"""Can this device train? Checks with stable ids, each with what to do about it. Nothing here changes anything.

What may crash is tried in a process of its own whose signal is read: builds of torch for another processor pass the
import on some boards and die in the first matrix product on two threads.
"""

from __future__ import annotations

import contextlib
import json
import platform
import queue
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Literal

import click
import psutil

from lwfed.child import describe_exit
from lwfed.data import open_source
from lwfed.edge_agent.identity import Access
from lwfed.edge_agent.session import REVOKED, to_enrolled
from lwfed.errors import ConfigError, Forbidden, LwfedError, Untrusted
from lwfed.transport.base import Connected, Disconnected, Event, Transport

PROBE_S = 120  # an SD card needs half a minute to load torch
CONNECT_S = 10
TORCH = (
    "import numpy, torch; torch.from_numpy(numpy.ones(1)); torch.set_num_threads(2); a = torch.ones(256, 256, requires_grad=True);"
    "(a @ a).sum().backward(); assert float(a.grad[0, 0]) == 512; print(torch.__version__)"
)
TORCHVISION = "import torchvision; print(torchvision.__version__)"
ONNX_RUNTIME = "import onnxruntime; print(onnxruntime.__version__)"
Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    id: str
    status: Status
    text: str
    advice: str = ""

    @property
    def section(self) -> str:
        return self.id.split(".")[0]


def examine(state: Path, data: str | None, access: Access | None) -> Iterator[Check]:
    """One check after the other, as each is done; `access` is to the broker, if that is to be tried."""
    yield from (_python(), _memory(), _disk(state))
    yield from _torch()
    if data is not None:
        yield _data(data)
    if access is not None:
        yield from _broker(access)


def report(checks: Iterator[Check], as_json: bool) -> int:
    """Print them as they come; returns the exit code: 1 if one failed."""
    failed = False
    for section, members in groupby(checks, lambda check: check.section):
        if not as_json:
            click.secho(section, bold=True)
        for check in members:
            failed |= check.status == "fail"
            click.echo(json.dumps(asdict(check)) if as_json else _line(check))
    return int(failed)


def _line(check: Check) -> str:
    mark = {"ok": click.style("ok  ", fg="green"), "warn": click.style("warn", fg="yellow"), "fail": click.style("FAIL", fg="red")}
    advice = f"\n        {check.advice}" if check.advice else ""
    return f"  {mark[check.status]}  {check.text}{advice}"


def _python() -> Check:
    text = f"Python {platform.python_version()} on {platform.machine()}"
    if sys.maxsize <= 2**32:
        return Check("device.python", "fail", f"{text}, 32 bits", "install a 64-bit system: there is no torch for 32 bits")
    return Check("device.python", "ok", text)


def _memory() -> Check:
    memory = psutil.virtual_memory()
    text = f"{memory.total / 1e6:.0f} MB of memory, {memory.available / 1e6:.0f} MB available"
    if memory.available < 300e6:
        return Check("device.memory", "fail", text, "torch alone takes 220 MB: end other programs or use a larger device")
    if memory.available < 700e6:
        return Check("device.memory", "warn", text, "enough for small models and batches only")
    return Check("device.memory", "ok", text)


def _disk(state: Path) -> Check:
    try:
        free = shutil.disk_usage(_existing(state)).free
    except OSError as error:
        return Check(
            "device.disk", "fail", f"{state} cannot hold the state ({error.strerror})", "check its permissions, or use another --state"
        )
    text = f"{free / 1e9:.1f} GB free on the disk of {state}"
    if free < 200e6:
        return Check("device.disk", "fail", text, "model, update and decoded images need room: free some, or use --state on another disk")
    return Check("device.disk", "warn" if free < 1e9 else "ok", text)


def _existing(folder: Path) -> Path:
    """`folder`, or the nearest one above it that is there."""
    for place in (folder, *folder.absolute().parents):
        with contextlib.suppress(FileNotFoundError):
            place.stat()
            break
    return place


def _torch() -> Iterator[Check]:
    if find_spec("torch") is None:
        advice = "pip install 'lwfed[train]', on a Raspberry Pi 'lwfed[pi]', on a Jetson NVIDIA's build"
        yield Check("torch.works", "fail", "torch is not installed", advice)
        return
    version, problem = _probe(TORCH)
    if problem is not None:
        yield Check("torch.works", "fail", f"torch cannot compute here: {problem}", _torch_advice(problem))
        return
    yield Check("torch.works", "ok", f"torch {version} multiplies and differentiates on 2 threads")
    if find_spec("torchvision") is not None:
        yield _torchvision(version)
    yield _onnx_runtime()


def _torchvision(torch: str) -> Check:
    vision, problem = _probe(TORCHVISION)
    if problem is None:
        return Check("torch.torchvision", "ok", f"`import torchvision` works: {vision}")
    # lwfed gets by without its compiled operators (lwfed/data/torchvision_sets.py), but not without the rest.
    need = "lwfed itself does not need that" if "torchvision::" in problem else "lwfed needs it for data sets by name only"
    advice = f"{need}; to mend it, install the build of torchvision that matches torch {torch}, from the index that torch came from"
    return Check("torch.torchvision", "warn", f"`import torchvision`, and so `import timm`, fails as it is installed: {problem}", advice)


def _onnx_runtime() -> Check:
    """Optional; but what dies at its import takes the training process along."""
    if find_spec("onnxruntime") is None:
        advice = "where a wheel exists, pip install 'lwfed[onnx]' lets it train faster above frozen layers"
        return Check("torch.onnxruntime", "ok", "ONNX Runtime is not installed: torch runs frozen layers", advice)
    version, problem = _probe(ONNX_RUNTIME)
    if problem is None:
        return Check("torch.onnxruntime", "ok", f"ONNX Runtime {version} can run frozen layers, by graphs that the server sends")
    advice = "pip install --upgrade 'lwfed[onnx]', or pip uninstall onnxruntime: torch does its work"
    return Check("torch.onnxruntime", "fail", f"ONNX Runtime fails as it is installed: {problem}", advice)


def _torch_advice(problem: str) -> str:
    if "Numpy is not available" in problem:
        return "this torch was built for numpy 1: pip install 'numpy<2'"
    if platform.machine() == "aarch64":
        return "on a Raspberry Pi 3 or 4 use torch below 2.10: pip install 'lwfed[pi]'; on a Jetson use NVIDIA's build"
    return "reinstall torch for this processor: https://pytorch.org/get-started/locally"


def _probe(code: str) -> tuple[str, str | None]:
    """What the code printed, and what went wrong."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PROBE_S)
    except subprocess.TimeoutExpired:
        return "", f"no result within {PROBE_S} s"
    if done.returncode < 0:
        return "", describe_exit(done.returncode)
    if done.returncode > 0:
        return "", (done.stderr.strip().splitlines() or ["no message"])[-1]
    return done.stdout.strip(), None


def _data(spec: str) -> Check:
    try:
        count = open_source(spec).check()
    except LwfedError as error:
        return Check("data.readable", "fail", str(error))
    return Check("data.readable", "ok", f"{spec}: {'known by name' if count is None else f'{count} images'}")


def _broker(access: Access) -> Iterator[Check]:
    address, transport = access.address, None
    try:
        transport = access.transport()
    except ConfigError as error:
        yield Check("broker.access", "fail", str(error))
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        yield Check("broker.dns", "fail", f"{address.host} has no address ({error})", "check the name, or give an IP address")
        return
    yield Check("broker.dns", "ok", f"{address.host} is {found[0][4][0]}")
    try:
        socket.create_connection((address.host, address.port), CONNECT_S).close()
    except OSError as error:
        advice = "is the broker running, is the port right, does a firewall stand between?"
        yield Check("broker.tcp", "fail", f"nothing answers at {address.host}:{address.port} ({error})", advice)
        return
    yield Check("broker.tcp", "ok", f"{address.host}:{address.port} answers")
    if transport is not None:
        yield _mqtt(access, transport)


def _mqtt(access: Access, transport: Transport) -> Check:
    address = access.address
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    transport.open(f"doctor-{secrets.token_hex(4)}", None, events.put)
    try:
        match events.get(timeout=CONNECT_S):
            case Connected():
                return Check("broker.mqtt", "ok", f"{address} lets this device in")
            case Disconnected(Untrusted() as reason) if access.device:
                return Check("broker.mqtt", "fail", str(to_enrolled(reason)))
            case Disconnected(reason):
                return Check("broker.mqtt", "fail", str(reason), REVOKED if isinstance(reason, Forbidden) else "")
    except queue.Empty:
        pass
    finally:
        transport.close()
    return Check(
        "broker.mqtt", "fail", f"{address} does not answer in MQTT within {CONNECT_S} s", "is it an MQTT broker? mqtts:// is for TLS ports"
    )
