"""``edge-agent profile``: what this device can train, measured on it."""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import psutil

from lwfed.config import RunConfig, load_config
from lwfed.console import counted
from lwfed.edge_agent.agent import torch_version
from lwfed.edge_agent.profiling import measure
from lwfed.edge_agent.profiling.cases import NO_FIT, PAPER, Case, judge, make_cases, measured, recommend, tried
from lwfed.edge_agent.profiling.condition import condition
from lwfed.edge_agent.profiling.limits import NO_LIMIT, NoGroup, limited
from lwfed.edge_agent.profiling.measure import WARM_UP, DidNotFit
from lwfed.edge_agent.profiling.page import page, reasons
from lwfed.edge_agent.resources import MB, own_share_bytes
from lwfed.errors import ConfigError, MissingDependency, StateError, WorkerFailed
from lwfed.plan import Strategy

STEPS = 5  # that count, at most
ENOUGH_S = 30.0  # for a case; then one step is enough
LIMITS = cache(limited)
NO_SUCH = "no such limit: "


@dataclass(frozen=True)
class Profile:
    """What the command was told."""

    config: str
    settings: tuple[str, ...]
    budget_mb: float | None
    stages: tuple[int, ...] | None
    strategies: tuple[Strategy, ...] | None
    threads: tuple[int, ...] | None
    limits: tuple[int, ...] | None
    images: int
    out: Path
    as_json: bool


def run_profile(told: Profile) -> int:
    """Measure, print, and leave report.json and report.html; returns the exit code.

    1 where the first strategy does not fit, and that of MissingDependency where nothing was tried for want of limits. SystemExit, which
    signals raise here, ends measuring: the cases measured until then are reported all the same, and its code is returned.
    """
    if torch_version() is None:
        raise MissingDependency("measuring needs torch: `edge-agent doctor` says which")
    config = load_config(told.config, told.settings)
    cases = make_cases(config, told.strategies, told.stages, told.threads, told.limits)
    budget_mb = told.budget_mb or round(own_share_bytes() / MB)
    _make(told.out)
    before = condition()
    some = f"up to {STEPS} steps each after {WARM_UP} to warm up, fewer where they are slow"
    click.echo(f"measures {counted(len(cases), 'case')}: {some}; Ctrl-C ends it, and keeps what was measured", err=True)
    records: list[dict[str, Any]] = []
    ended: SystemExit | None = None
    try:
        with _progress(cases) as shown:
            for case in cases:
                records.append(judge(measure_case(case, told, shown(case)), budget_mb))
    except SystemExit as asked:
        if not records:
            raise
        ended = asked
    report = make_report(told, config, records, budget_mb)
    report["interrupted"] = f"Interrupted: {len(records)} of {counted(len(cases), 'case')} were measured." if ended else ""
    report |= {"before": asdict(before), "after": asdict(after := condition())}
    _write(told.out / "report.json", json.dumps(report, indent=1) + "\n")
    _write(told.out / "report.html", page(report))
    if told.as_json:
        click.echo(json.dumps(report))
    else:
        click.echo(
            "\n".join((*table(report), "", f"Before: {before.text}.", f"After:  {after.text}.", f"report: {told.out / 'report.html'}"))
        )
    if ended:
        return int(ended.code or 0)
    first = tried(record for record in records if record["strategy"] == records[0]["strategy"])
    return int(not all(record["fits"] for record in first)) if first else MissingDependency.exit_code


def measure_case(case: Case, told: Profile, on_step: Callable[[int, int], None]) -> dict[str, Any]:
    """Its record; with a `reason` instead of figures where there are none. Raises ConfigError for a budget below what imports take."""

    def on_ready(baseline_mb: float) -> None:
        if told.budget_mb is not None and told.budget_mb < baseline_mb:
            raise ConfigError(
                f"--budget {told.budget_mb:g}: the agent with torch takes {baseline_mb:.0f} MB here before any data; "
                "give more, or use a device with more memory"
            )

    limit = NO_LIMIT if case.limit_mb is None else LIMITS(case.limit_mb)
    if limit.problem:
        return {**case.record(), "skipped": True, "reason": f"{NO_SUCH}{limit.problem}"}
    batch_size = case.config.train.batch_size
    with measure.sampled(case.config, case.stage, STEPS) as sample:
        travels = {"bytes_down": sample.bytes_down, "bytes_up": sample.bytes_up, "gmacs": round(sample.macs / 1e9, 2)}
        before = condition()
        try:
            found = measure.agent(case.config, sample, case.stage, on_step, on_ready, limit, told.budget_mb, ENOUGH_S)
        except DidNotFit as problem:
            return {**case.record(), **travels, "reason": f"{NO_FIT}{problem}"}
        except NoGroup as problem:
            return {**case.record(), **travels, "skipped": True, "reason": f"{NO_SUCH}{problem}"}
        except WorkerFailed as problem:
            return {**case.record(), **travels, "skipped": True, "reason": str(problem)}
    times = {"epoch_s": round(found.epoch_s(told.images, batch_size), 2)}
    return {**case.record(), **travels, **found.record(), **times, "before": asdict(before), "after": asdict(condition())}


def make_report(told: Profile, config: RunConfig, records: Sequence[dict[str, Any]], budget_mb: float) -> dict[str, Any]:
    return {
        "config": config.run.name,
        "model": config.model.model_dump(mode="json"),
        "batch_size": config.train.batch_size,
        "budget_mb": budget_mb,
        "images": told.images,
        "codec": codec_text(config),
        "steps": STEPS,
        "cases": records,
        "recommended": recommend(records, budget_mb, config),
        "paper": PAPER,
        "machine": {
            "processor": platform.machine(),
            "cores": psutil.cpu_count(),
            "memory_mb": round(psutil.virtual_memory().total / 1e6),
            "system": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "torch": torch_version(),
        },
    }


def codec_text(config: RunConfig) -> str:
    """In what form updates travel."""
    transfer = config.transfer
    return transfer.codec + (f", top_k {transfer.top_k:g}" if transfer.top_k < 1 else "")


def table(report: dict[str, Any]) -> Iterator[str]:
    if report["interrupted"]:
        yield report["interrupted"]
    yield f"batch {report['batch_size']}; an epoch of {report['images']} images; MB of 10^6 bytes, of all processes of the agent"
    yield f"MB down and up: a round in the codec {report['codec']} (transfer.codec), for a device that was in the round before"
    head = (f"{name:>{width}}" for name, width in HEAD.items())
    yield f"{'strategy':13}{'stage':>6}{'threads':>9}{'limit':>7}{''.join(head)}"
    for record in report["cases"]:
        limit = "-" if record["limit_mb"] is None else record["limit_mb"]
        start = f"{record['strategy']:13}{record['stage']:>6}{record['threads']:>9}{limit:>7}"
        yield start + (_figures(record) if "memory" in record else f"  {record['reason']}")
    if measured(report["cases"]):
        yield "Peak: the training process by its high-water mark, the control process by its share. Training: beside libraries."
        yield ""
    yield from reasons(report["cases"])
    yield ""
    yield from report["recommended"]["texts"]
    yield ""
    yield "The paper (Table 2, ViT-Tiny, batch 512, GPU memory) has end to end 8.72 GB, layer-wise 2.61 GB: 3.34x; progressive 8.69 GB."


HEAD = {"peak": 8, "training": 10, "swap": 6, "files": 7, "s/step": 9, "s/epoch": 9, "MB down": 9, "MB up": 7}
HEAD |= {"frozen by": 11, "at a time": 11, "fits": 6}


def _figures(record: dict[str, Any]) -> str:
    memory = record["memory"]
    megabytes = "".join(f"{memory[key]:{HEAD[name]}.0f}" for name, key in MEMORY.items())
    travels = f"{record['bytes_down'] / 1e6:9.1f}{record['bytes_up'] / 1e6:7.1f}"
    planned = f"{record['planned']['prefix']:>11}{record['planned']['micro_batch']:11}"
    return f"{megabytes}{record['step_s']:9.2f}{record['epoch_s']:9.1f}{travels}{planned}{'yes' if record['fits'] else 'NO':>6}"


MEMORY = {"peak": "peak_mb", "training": "training_mb", "swap": "swap_mb", "files": "files_mb"}


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror or error}; choose another --out") from None


@contextlib.contextmanager
def _progress(cases: list[Case]) -> Iterator[Callable[[Case], Callable[[int, int], None]]]:
    """A bar on a terminal, otherwise a line for each case; both on stderr."""
    if not sys.stderr.isatty():

        def line(case: Case) -> Callable[[int, int], None]:
            click.echo(case.text, err=True)
            return lambda step, steps: None

        yield line
        return
    each = WARM_UP + STEPS
    with click.progressbar(length=each * len(cases), file=sys.stderr, item_show_func=str, width=30) as bar:

        def begin(case: Case) -> Callable[[int, int], None]:
            bar.update(cases.index(case) * each - bar.pos, case.text)
            return lambda step, steps: bar.update(1, case.text)

        yield begin
