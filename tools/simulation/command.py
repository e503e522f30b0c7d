"""``lwfed simulate``: runs of several strategies and seeds, one after the other, each of which can be gone on with; and their report."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lwfed.cloud_server.course import Course
from lwfed.cloud_server.serve import check_sources
from lwfed.config import RunConfig, load_config
from lwfed.data import Source, open_source
from lwfed.errors import ConfigError, DataError, RunStopped, StateError
from lwfed.locks import locked_state
from lwfed.tools.machine import machine, needed, versions
from lwfed.tools.screen import Screen
from lwfed.tools.simulation import report as reports
from lwfed.tools.simulation.records import Record, record, summarise
from lwfed.tools.simulation.world import World

OURS = {"run.seed": "--seeds", "rounds.min_devices": "data.devices, all of which are there", "worker.device": "--device"}
PACKAGES = ("lwfed", "torch", "numpy")
SETTING_FILE = "simulation.json"


@dataclass(frozen=True)
class Simulation:
    """What `lwfed simulate` was told; None is for the configuration to say."""

    config: str
    settings: tuple[str, ...]
    out: Path
    data: str
    dropout: float
    seeds: tuple[int, ...] | None
    strategies: tuple[str, ...] | None
    workers: int | None
    device: str | None


def simulate(told: Simulation) -> None:
    """Leave report.json, report.md and curves.png in `told.out`, and each run in a folder of its own below it."""
    draw = needed("lwfed.tools.simulation.curves", "a simulation's report").draw
    runs = plan(told)
    for config in runs.values():
        check_sources(config)
    began = time.monotonic()
    try:
        told.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"cannot write to {told.out}: {error.strerror or error}; choose another --out") from None
    screen = Screen(sys.stdout.isatty())
    with locked_state(told.out.absolute(), "choose another --out"):
        found = [run_one(config, folder, told, screen) for folder, config in runs.items()]
        report = make_report(told, list(runs.values()), found, time.monotonic() - began)
        reports.write(told.out, report, draw)
    reports.show(report, told.out)
    if stopped := [run for run in found if run["stopped"]]:
        places = ", ".join(f"{run['strategy']}, seed {run['seed']}" for run in stopped)
        raise RunStopped(f"stopped, because a stage collapsed ({places}): choose other settings, or stages.on_collapse warn")


def plan(told: Simulation) -> dict[Path, RunConfig]:
    """Folder -> configuration of every run, all of them valid. Raises ConfigError and DataError."""
    for setting in told.settings:
        if (key := setting.partition("=")[0].strip()) in OURS:
            raise ConfigError(f"--set {setting}: for a simulation {key} follows from {OURS[key]}")
    base = load_config(told.config, [*told.settings, "rounds.sample=null", "rounds.oversample=1.0"])
    settings = [*told.settings, f"rounds.min_devices={base.data.devices}"]
    source = open_source(told.data)
    if base.evaluation.data is None and source.divided and _has_labels(source):
        settings.append(f"evaluation.data={source.path}")
    if told.device is not None:
        settings.append(f"worker.device={told.device}")
    runs = {}
    for strategy in told.strategies or (base.stages.strategy,):
        for seed in told.seeds or (base.run.seed,):
            folder = told.out.absolute() / (strategy if told.strategies else "") / f"seed-{seed}"
            runs[folder] = load_config(told.config, [*settings, f"stages.strategy={strategy}", f"run.seed={seed}"])
    return runs


def _has_labels(source: Source) -> bool:
    try:
        source.check_labels()
    except DataError:
        return False
    return True


def run_one(config: RunConfig, root: Path, told: Simulation, screen: Screen) -> Record:
    """Begin the run below `root`, go on with it, or find it finished. Raises StateError for another simulation's folder."""
    root.mkdir(parents=True, exist_ok=True)
    course = Course(config, root, durable=False)
    try:
        _accept(root, told)
        if not course.state.over:
            with screen.run(config, sum(one.devices for one in course.store.contributed().values())):
                World(course, told.data, told.dropout, told.workers, screen.show).run()
        elif not course.encoder_path.is_file():  # it was killed at its very end
            course.export()
        return record(course)
    finally:
        course.store.close()


def make_report(told: Simulation, configs: Sequence[RunConfig], runs: Sequence[Record], seconds: float) -> dict[str, Any]:
    strategies = dict.fromkeys(run["strategy"] for run in runs)
    return {
        "summary": {strategy: summarise([run for run in runs if run["strategy"] == strategy]) for strategy in strategies},
        "runs": list(runs),
        "seeds": list(dict.fromkeys(run["seed"] for run in runs)),
        "data": told.data if open_source(told.data).named else Path(told.data).name,
        "dropout": told.dropout,
        "config": configs[0].model_dump(mode="json"),
        "machine": machine(),
        "versions": versions(PACKAGES),
        "command": command_line(told),
        "seconds": round(seconds, 1),
    }


def command_line(told: Simulation) -> str:
    """That makes the same runs; without where it was and how many processes it took."""
    words = ["lwfed", "simulate", told.config, "--data", told.data]
    words += [f"--dropout={told.dropout:g}"] if told.dropout else []
    words += [f"--seeds={','.join(map(str, told.seeds))}"] if told.seeds else []
    words += [f"--strategies={','.join(told.strategies)}"] if told.strategies else []
    words += [f"--device={told.device}"] if told.device else []
    return shlex.join([*words, *(f"--set={setting}" for setting in told.settings)])


def _accept(root: Path, told: Simulation) -> None:
    """What decides on a run beside its configuration must be as it was."""
    source = open_source(told.data)
    wanted = {"data": source.path, "dropout": told.dropout}
    file = root / SETTING_FILE
    try:
        stored = json.loads(file.read_text()) if file.exists() else None
        if stored is None:
            file.write_text(json.dumps(wanted))
    except (OSError, ValueError) as error:
        raise StateError(f"{file} cannot be used ({error}): choose another --out") from None
    for name, value in (stored or wanted).items():
        if value != wanted[name]:
            raise StateError(
                f"{root} holds a simulation with --{name} {value}, not {wanted[name]}: go on with that, or choose another --out"
            )
