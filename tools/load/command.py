"""``lwfed bench server``: one server and its broker under the load of many devices, with the real protocol."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import psutil

from lwfed.cloud_server.store import open_store
from lwfed.config import RunConfig, load_config
from lwfed.console import counted
from lwfed.edge_agent.resources import HIGH_WATER, status_mb
from lwfed.errors import ConfigError
from lwfed.tools.load.workers import Workers
from lwfed.tools.machine import machine
from lwfed.tools.programs import Programs

# One layer of ViT-Tiny: what a device trains and uploads in the first stage of the paper, the largest of all.
SETTINGS = ("model.depth=1", "transfer.codec=int8", "rounds.quorum=0.01", "rounds.straggler_factor=null", "worker.linger_s=0")
OURS = ("run.", "rounds.", "stages.", "calibration.", "evaluation.")
ROUND_S = 600  # of a round with a single device; a second more for each one
PROGRAMS = {"mosquitto": "mosquitto", "embedded": "lwfed.cloud_server.embedded"}  # words of their command lines
Kind = Literal["mosquitto", "embedded"]


@dataclass
class Round:
    """Times are those at which the server said it."""

    round: int
    devices: int  # chosen
    started_s: float
    first_s: float = 0.0  # the first update is in
    closed_s: float = 0.0
    ended_s: float = 0.0  # the next model is ready
    updates: int = 0  # that counted

    def report(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "devices": self.devices,
            "updates": self.updates,
            "download_s": round(self.first_s - self.started_s, 2),
            "upload_s": round(self.closed_s - self.first_s, 2),
            "close_s": round(self.ended_s - self.closed_s, 2),
        }


@dataclass
class Log:
    """The run, from what the server says."""

    rounds: list[Round] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    over: bool = False

    def note(self, said: Mapping[str, Any]) -> None:
        match said:
            case {"event": "round", "status": "started"}:
                self._end_round(said["time"])
                self.rounds.append(Round(said["round"], said["devices"], said["time"]))
            case {"event": "contribution"} if not self.rounds[-1].first_s:
                self.rounds[-1].first_s = said["time"]
            case {"event": "round", "status": "closed"}:
                self.rounds[-1].closed_s, self.rounds[-1].updates = said["time"], said["devices"]
            case {"event": "stage", "status": "ended"}:
                self._end_round(said["time"])
            case {"event": "warning"}:
                self.warnings.append(said["text"])
            case {"event": "finished"}:
                self.over = True

    def _end_round(self, time_s: float) -> None:
        if self.rounds:
            self.rounds[-1].ended_s = time_s


@dataclass(frozen=True)
class Used:
    """By one process, from its start on."""

    peak_mb: float | None  # None where the system keeps no high-water mark
    cpu_s: float

    @classmethod
    def by(cls, process: psutil.Process) -> Used:
        times = process.cpu_times()
        peak = status_mb(Path("/proc") / str(process.pid), HIGH_WATER)
        return cls(None if peak is None else round(peak, 1), round(times.user + times.system, 1))


def run_load(counts: Sequence[int], rounds: int, broker: Kind, settings: Sequence[str], as_json: bool) -> bool:
    """Whether nothing was lost, with any number of devices."""
    configs = [configuration(count, rounds, settings) for count in counts]
    found = []
    for config, chosen in configs:
        click.echo(f"{counted(config.rounds.min_devices, 'device')}, {counted(rounds, 'round')}", err=True)
        with tempfile.TemporaryDirectory(prefix="lwfed-load-") as folder:
            found.append(measure(config, chosen, broker, Path(folder)))
    report = {"broker": broker, "rounds": rounds, "loads": found, "machine": machine()}
    click.echo(json.dumps(report) if as_json else "\n".join(lines(report)))
    return all(one["lost"] == 0 for one in found)


def configuration(devices: int, rounds: int, settings: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """Of the run with so many devices, and the settings that make it of base.yaml. Raises ConfigError."""
    for setting in settings:
        if setting.startswith(OURS):
            raise ConfigError(f"--set {setting}: the load test decides on this; --devices and --rounds say how large it is")
    wanted = [
        *SETTINGS,
        *settings,
        f"rounds.min_devices={devices}",
        f"rounds.deadline_s={ROUND_S + devices}",
        f"stages.rounds_per_stage={rounds}",
    ]
    config = load_config("base", wanted)
    if config.stage_count != 1:
        raise ConfigError("the load test runs a single stage: leave model.depth at 1")
    return config, wanted


def measure(config: RunConfig, settings: Sequence[str], broker: Kind, folder: Path) -> dict[str, Any]:
    """One run with the devices that its first round waits for."""
    devices, rounds = config.rounds.min_devices, config.round_counts[0]
    log, tally = Log(), None
    state = folder / "server"
    with Programs() as programs, contextlib.ExitStack() as watched:
        workers: Workers | None = None  # from the first round on: those that aggregate
        place = ("--broker", broker, "--port", "0", "--state", str(state))
        programs.start("server", "lwfed.cloud_server.cli", "serve", "--config", "base", *(f"--set={one}" for one in settings), *place)
        while tally is None or not log.over:
            line = programs.next()
            match line.program, line.said:
                case "server", dict(said):
                    log.note(said)
                    if log.rounds and workers is None:
                        workers = watched.enter_context(Workers(psutil.Process(programs.pid("server"))))
                    if said["event"] == "broker":
                        around = (str(devices), str(rounds), str(folder / "devices"))
                        programs.start("devices", "lwfed.tools.load.devices", said["url"], *around)
                case "devices", dict(said):
                    tally = said
        server = psutil.Process(programs.pid("server"))
        used = {"server": Used.by(server), "broker": Used.by(_broker(server, broker))}
    with contextlib.closing(open_store(state, config.run.name)) as store:
        recorded = len({(one.round, one.participant) for one in store.contributions()})
    return {**summary(devices, rounds, log, tally, recorded, used), "worker_peak_mb": round(workers.peak_mb, 1) if workers else 0.0}


def summary(devices: int, rounds: int, log: Log, tally: Mapping[str, Any], recorded: int, used: Mapping[str, Used]) -> dict[str, Any]:
    """`lost`: updates, of one a device and round, that were not recorded, did not count, or of which a device does not know it."""
    expected, counting = devices * rounds, sum(one.updates for one in log.rounds)
    told = [one.report() for one in log.rounds]
    later = told[1:] or told  # the first round also brings the whole model
    return {
        "devices": devices,
        "update_bytes": tally["update_bytes"],
        "updates_per_s": round(sum(one["updates"] for one in later) / sum(one["upload_s"] for one in later), 1),
        **{name: round(statistics.mean(one[name] for one in later), 2) for name in ("download_s", "upload_s", "close_s")},
        **{f"{name}_{key}": value for name, one in used.items() for key, value in asdict(one).items()},
        "expected": expected,
        "recorded": recorded,
        "counted": counting,
        "accepted": tally["accepted"],
        "lost": expected - min(expected, recorded, counting, tally["accepted"]),
        "refused": tally["refused"],
        "disconnections": tally["disconnections"],
        "warnings": log.warnings,
        "rounds": told,
    }


COLUMNS = (
    "devices",
    "updates_per_s",
    "download_s",
    "upload_s",
    "close_s",
    "server_peak_mb",
    "worker_peak_mb",
    "broker_peak_mb",
    "server_cpu_s",
    "lost",
)


def lines(report: Mapping[str, Any]) -> list[str]:
    rows = [COLUMNS, *(tuple(str(one[name]) for name in COLUMNS) for one in report["loads"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _broker(server: psutil.Process, kind: Kind) -> psutil.Process:
    return next(child for child in server.children() if any(PROGRAMS[kind] in word for word in child.cmdline()))
