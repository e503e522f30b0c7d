"""``lwfed bench``: ours beside the plain baseline, on this machine, in one run."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import click

from lwfed.edge_agent.profiling.condition import condition
from lwfed.edge_agent.profiling.measure import EPOCH_IMAGES, WARM_UP
from lwfed.errors import MissingDependency
from lwfed.models.allocator import read_code_in_pages
from lwfed.tools.bench.report import lines, ratios
from lwfed.tools.bench.rows import BASELINES, Row, blank, estimate_s, make_rows, measure_row
from lwfed.tools.bench.views import measure_views
from lwfed.tools.machine import machine, versions

NOTES = (
    "Peak: of all processes of a program; the one that trains by its high-water mark, others, such as the agent's, by their share (PSS).",
    "Libraries: the same sum after the imports. Training: the rest of the peak. Memory of several stages is that of the largest.",
    "Time: median of up to {steps} steps after {warm_up} to warm up, with views, on one thread; of several stages their mean.",
    "CPU: what the process that trains had of processors in such a step; where the wall clock says more, others had them.",
    f"An epoch has {EPOCH_IMAGES} images. They are noise: neither time nor memory depends on what they show.",
    "GMAC: 10^9 multiply-accumulates, of all branches and views. MB/round: down and up, in float32; ours int8, uncompressed.",
    "Frozen layers in int8 (onnx_int8) are near to exact, as everything else of ours is: at most 5 % off, checked at each stage.",
    "Accumulating gradients changes the loss of the baseline: each piece has its own negatives and statistics. Ours keeps it.",
)
REUSED = (
    "Views used again: its time has a step's part of computing all layers below ahead, once for the epochs of a stage; its GMAC are "
    "those of a device that has the stage before, and computes the new layer only."
)


def run_bench(quick: bool, as_json: bool) -> bool:
    """Whether ours could be compared with anything. SystemExit, which signals raise here, passes when what was measured is printed."""
    for module in ("torchvision", "timm"):
        if find_spec(module) is None:  # importing it would take its memory here too
            raise MissingDependency(f"the baseline needs {module}: pip install 'lwfed[backbones]'")
    rows = make_rows(quick)
    click.echo(f"takes about {max(1, round(estimate_s(rows) / 60))} min here; Ctrl-C ends it, and prints what was measured", err=True)
    before = condition()
    views = measure_views(rows[0].config)
    read_code_in_pages()  # for all rows; while this process has libraries mapped, the cache keeps them as it has them
    records = [blank(row) for row in rows]
    ended: SystemExit | None = None
    try:
        with _progress(rows) as shown:
            for row, record in zip(rows, records, strict=True):
                measure_row(row, record, shown(row))
    except SystemExit as asked:
        if not any(record["stages"] for record in records):
            raise
        ended = asked
    report = {**make_report(rows, records, views), "interrupted": ended is not None}
    report |= {"before": asdict(before), "after": asdict(after := condition())}
    click.echo(json.dumps(report) if as_json else "\n".join(lines(report | {"before": before.text, "after": after.text})))
    if ended:
        raise ended
    return report["ratios"] is not None


def make_report(rows: list[Row], records: list[dict[str, Any]], views: dict[str, float]) -> dict[str, Any]:
    train, model = rows[0].config.train, rows[0].config.model
    stages = next(row.stages for row in rows if row.name == "ours")
    which = f"stage {stages[0]}" if len(stages) == 1 else f"stages {stages[0]} to {stages[-1]}"
    size = (
        f"vit of width {model.width}, {model.depth} layers, {model.image_size}x{model.image_size} pixels in patches of {model.patch_size}"
    )
    return {
        "ratios": ratios(records, BASELINES),
        "title": f"{size}; batch {train.batch_size}, {which} of {model.depth}, threads: {train.threads}",
        "rows": records,
        "views": views,
        "notes": [
            *(note.format(steps=rows[0].steps, warm_up=WARM_UP) for note in NOTES),
            *([REUSED] if any(one["name"] == "ours_reused" and one["stages"] for one in records) else []),
        ],
        "machine": machine(),
        "versions": versions(("torch", "timm", "torchvision", "numpy")),
    }


@contextlib.contextmanager
def _progress(rows: list[Row]) -> Iterator[Callable[[Row], Callable[[int, int, int], None]]]:
    """A bar on a terminal, otherwise a line for each row; both on stderr."""
    if not sys.stderr.isatty():

        def line(row: Row) -> Callable[[int, int, int], None]:
            click.echo(row.title + (f": left out, {row.reason}" if row.reason else ""), err=True)
            return lambda stage, step, steps: None

        yield line
        return
    length = sum(row.macs(stage) for row in rows if not row.reason for stage in row.stages) / 1e9
    with click.progressbar(length=round(length), file=sys.stderr, item_show_func=str, width=30) as bar:

        def begin(row: Row) -> Callable[[int, int, int], None]:
            def show(stage: int, step: int, steps: int) -> None:
                bar.update(round(row.macs(stage) / 1e9 / steps), f"{row.title}, stage {stage}")

            bar.update(0, row.title)
            return show

        yield begin
