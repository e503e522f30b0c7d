"""Putting a server together: run, broker, transport; and taking it apart again, however it ends."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lwfed.cli import Connection
from lwfed.cloud_server.broker import ManagedBroker
from lwfed.cloud_server.course import Course
from lwfed.cloud_server.gate import Gate, Place, check_authority
from lwfed.cloud_server.limits import Door
from lwfed.cloud_server.news import REMEDY, News
from lwfed.cloud_server.registry import next_epoch
from lwfed.cloud_server.server import Server
from lwfed.cloud_server.telling import place, say_over, stop_reason
from lwfed.cloud_server.workshop import starter
from lwfed.config import RunConfig
from lwfed.console import Console
from lwfed.data import open_source
from lwfed.errors import ConfigError, MissingDependency, RunStopped
from lwfed.locks import locked_state
from lwfed.transport.address import BrokerAddress
from lwfed.transport.base import Transport
from lwfed.wire.topics import Topics

DEFAULT_PORT = 1883
MANAGED: tuple[Literal["auto", "mosquitto", "embedded"], ...] = ("auto", "mosquitto", "embedded")


@dataclass(frozen=True)
class Options:
    broker: str  # auto | mosquitto | embedded | URL
    port: int | None  # of a broker started here, for this machine only
    listen: str | None  # HOST[:PORT], of one for enrolled devices
    authority: Path  # folder of the certificates and of the record of enrolled devices
    connection: Connection
    until_done: bool
    database: str | None  # address of one of PostgreSQL


def serve_run(config: RunConfig, root: Path, options: Options, console: Console) -> None:
    """Serve the run below `root`, which the caller has locked, until it is finished or somebody ends it."""
    check_sources(config)
    inlet, external = _inlet(options), _external(options)
    with ExitStack() as stack:
        if inlet is not None:
            check_authority(options.authority)
        least_epoch = 0 if inlet is None else next_epoch(options.authority)
        # Nothing of the run is there before, should options be refused.
        course = Course(config, root, database=options.database, least_epoch=least_epoch)
        stack.callback(course.store.close)
        if course.state.over and options.until_done:  # which needs neither broker nor gate
            _say_over(News(console, config, ""), course)
            return
        gate = None if inlet is None else _gate(inlet, options, config, course.epoch, stack)
        if external is not None:
            broker, (address, transport) = None, external
        else:
            broker = _broker(options, config, root, gate, stack)
            address = broker.address
            transport = (gate.connection() if gate else options.connection).transport(address)
        news = News(console, config, str(gate.public_address if gate else address), gated=gate is not None)
        news.broker(broker.kind if broker else "external")
        status = course.state.phase if course.state.over else "resumed" if course.resumed else "started"
        news.run(course.run_id, course.rules, status, place(course), root)
        if options.database is not None:
            news.doing(f"the run is kept in {course.store.database.name}")
        if not course.rules.judge:
            news.unjudged()
        for change in course.changed:
            news.doing(f"changed setting {change}")
        if broker is None:
            news.doing(f"connecting to {address}")
        server = Server(
            course,
            transport,
            news,
            starter(config.train.threads),
            until_done=options.until_done,
            revive=broker.ensure if broker else lambda: "",
            kill_broker=broker.kill if broker else lambda why: None,
            gate=gate,
            door=Door(Topics(config.run.fleet), time.monotonic),
        )
        server.run()
        if not course.state.over:
            news.doing("stopped; nothing is lost, the same command goes on from here")
        elif options.until_done:
            _end(course)


def check_sources(config: RunConfig) -> None:
    """What a run needs on this machine, found wanting before anybody joins. Raises DataError and MissingDependency."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        raise MissingDependency("the server needs torch: pip install 'lwfed[server]'")
    for spec in (config.calibration.data if config.calibration.every != "never" else None, config.evaluation.data):
        if spec is not None:
            open_source(spec).check()
    if config.evaluation.data is not None:
        open_source(config.evaluation.data).check_labels()


def _inlet(options: Options) -> Place | None:
    """Where devices of other machines are let in, if they are. Raises ConfigError."""
    if options.listen is None:
        return None
    if options.broker not in ("auto", "mosquitto"):
        raise ConfigError(f"--listen is for a mosquitto started here, not for --broker {options.broker}: leave one of them out")
    if options.port is not None:
        raise ConfigError(f"--port is for a broker on loopback: write the port behind the host, --listen {options.listen}:{options.port}")
    return Place.parse(options.listen)


def _external(options: Options) -> tuple[BrokerAddress, Transport] | None:
    """The broker that runs already and the way to it, unless one is to be started. Raises ConfigError."""
    if options.broker in MANAGED:
        if options.connection != Connection():
            raise ConfigError(
                f"--broker {options.broker} starts a broker of its own: credentials and --insecure go with the address of another one"
            )
        return None
    if "://" not in options.broker:
        raise ConfigError(f"--broker {options.broker!r}: write auto, mosquitto, embedded, or the address of a broker, mqtt://HOST")
    if options.port is not None:
        raise ConfigError(f"--port is for a broker started here; write the port into the address, {options.broker}:{options.port}")
    address = BrokerAddress.parse(options.broker)
    return address, options.connection.transport(address)


def _gate(inlet: Place, options: Options, config: RunConfig, epoch: int, stack: ExitStack) -> Gate:
    folder = stack.enter_context(locked_state(options.authority, "one server of a user admits devices of other machines: end the other"))
    gate = Gate(folder, inlet, config.run.fleet)
    stack.callback(gate.close)
    gate.registry.claim(epoch)
    return gate


def _broker(options: Options, config: RunConfig, root: Path, gate: Gate | None, stack: ExitStack) -> ManagedBroker:
    """One that was started; devices come to it."""
    kind = next(one for one in MANAGED if one == options.broker)
    port = DEFAULT_PORT if options.port is None else options.port
    broker = ManagedBroker(kind, port, root / "broker", config.transfer.chunk_bytes, gate)
    broker.start()
    stack.callback(broker.close)
    if gate is not None:
        gate.advertise()
    return broker


def _say_over(news: News, course: Course) -> None:
    news.run(course.run_id, course.rules, course.state.phase, place(course), course.root)
    say_over(news, course)
    _end(course)


def _end(course: Course) -> None:
    if course.state.phase == "stopped":
        raise RunStopped(f"{stop_reason(course.state)}; {REMEDY}: begin another run with --set run.name=NAME")
