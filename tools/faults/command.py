"""``lwfed simulate --faults``: many schedules, several processes, one summary; one schedule alone is shown as it goes."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click

from lwfed.config import RunConfig, load_config
from lwfed.console import counted, printable
from lwfed.tools.faults.schedule import draw
from lwfed.tools.faults.world import Note, Outcome, World

BASE = ("calibration.data=canned", "model.width=8", "model.heads=2", "ssl.method=simclr")
MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108, for files that need no disk; elsewhere schedules take longer
WORTH_A_POOL = 100  # schedules: starting processes takes longer than fewer of them


@dataclass
class Summary:
    schedules: int = 0
    rounds: int = 0
    virtual_s: float = 0.0
    found: dict[int, tuple[str, ...]] = field(default_factory=dict)  # failing seed -> what was violated
    faults: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        self.schedules += 1
        self.rounds += outcome.rounds
        self.virtual_s += outcome.virtual_s
        self.faults += outcome.faults
        if outcome.violations:
            self.found[outcome.seed] = outcome.violations

    @property
    def violations(self) -> int:
        return sum(map(len, self.found.values()))


def run_faults(count: int, seed: int, as_json: bool) -> bool:
    """Whether all schedules of the seeds from `seed` on held what the judge asks of them."""
    began = time.monotonic()
    shown = None if as_json or count > 1 else _show
    summary = Summary()
    for outcome in run_all(range(seed, seed + count), shown):
        summary.add(outcome)
    seconds = time.monotonic() - began
    if as_json:
        click.echo(json.dumps(_report(summary, seconds)))
    else:
        _tell(summary, seconds)
    return not summary.found


def run_all(seeds: range, note: Note | None = None) -> Iterator[Outcome]:
    """In the order of their seeds."""
    processes = os.cpu_count() or 1
    if len(seeds) < WORTH_A_POOL or processes == 1:
        yield from run_some(seeds, note)
        return
    pieces = [seeds[start : start + WORTH_A_POOL // 4] for start in range(0, len(seeds), WORTH_A_POOL // 4)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for outcomes in pool.map(_run_piece, pieces):
            yield from outcomes


def run_some(seeds: Iterable[int], note: Note | None = None) -> Iterator[Outcome]:
    base = load_config("base", BASE)
    where = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else None
    with _modules_left_out():
        for seed in seeds:
            with tempfile.TemporaryDirectory(prefix="lwfed-faults-", dir=where) as folder:
                yield run_one(seed, base, Path(folder), note)


@contextlib.contextmanager
def _modules_left_out() -> Iterator[None]:
    """Of garbage collection for a block, with all else that there is already: collections of what schedules leave behind look at less."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run_one(seed: int, base: RunConfig, folder: Path, note: Note | None) -> Outcome:
    return World(draw(seed), base, folder, note).run()


def _run_piece(seeds: range) -> list[Outcome]:
    return list(run_some(seeds))


def _report(summary: Summary, seconds: float) -> dict[str, object]:
    return {
        "schedules": summary.schedules,
        "violations": summary.violations,
        "failing_seeds": sorted(summary.found),
        "found": {str(seed): list(texts) for seed, texts in sorted(summary.found.items())},
        "rounds": summary.rounds,
        "faults": dict(sorted(summary.faults.items())),
        "virtual_hours": round(summary.virtual_s / 3600, 1),
        "seconds": round(seconds, 1),
    }


def _tell(summary: Summary, seconds: float) -> None:
    for seed, texts in sorted(summary.found.items()):
        for text in texts:
            click.echo(f"seed {seed}: {printable(text)}")
        click.echo(f"  replay: lwfed simulate --faults 1 --seed {seed}")
    faults = ", ".join(f"{kind} {number}" for kind, number in sorted(summary.faults.items())) or "none"
    click.echo(f"{counted(summary.schedules, 'schedule')}, {counted(summary.rounds, 'round')}: {counted(summary.violations, 'violation')}")
    click.echo(f"faults: {faults}")
    click.echo(f"{summary.virtual_s / 3600:.1f} hours of virtual time in {seconds:.1f} s")


def _show(now: float, who: str, text: str) -> None:
    click.echo(f"{now:9.3f}  {who:9}  {printable(text)}")
