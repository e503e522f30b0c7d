"""What a configuration costs a device under each strategy, stage by stage and in all, as JSON or as a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any, get_args

import click

from lwfed.config import RunConfig
from lwfed.models.cost import PAPER_GB, paper_bytes, stage_cost
from lwfed.models.measure import Measured, measure
from lwfed.plan import Strategy
from lwfed.tools.cost.traffic import obstacle, stage_traffic

Record = dict[str, Any]
COMPARED = ("gflops_paper", "gflops_true", "comm_gb_paper", "memory_mb")


def run_cost(config: RunConfig, as_json: bool) -> None:
    report = make_report(config)
    click.echo(json.dumps(report) if as_json else "\n".join(_table(config, report)))


def make_report(config: RunConfig) -> Record:
    """`rows` of all stages of all strategies and `totals` of each, under the other keys of `config`; `obstacles`: why one cannot run."""
    measured = measure(config)
    configs = {strategy: under(config, strategy) for strategy in get_args(Strategy)}
    rows = {strategy: _rows(one, measured) for strategy, one in configs.items()}
    fp32 = sum(one.down + one.up for one in stage_traffic(_fp32(configs["end_to_end"])))
    totals = {strategy: _total(configs[strategy], measured, found, fp32) for strategy, found in rows.items()}
    for found in totals.values():
        for name in COMPARED:
            found[f"{name}_ratio"] = totals["end_to_end"][name] / found[name]
    obstacles = {strategy: why for strategy, one in configs.items() if (why := obstacle(one))}
    listed = [row for found in rows.values() for row in found]
    return {"strategy": config.stages.strategy, "rows": listed, "totals": totals, "obstacles": obstacles}


def under(config: RunConfig, strategy: Strategy) -> RunConfig:
    return config.model_copy(update={"stages": config.stages.model_copy(update={"strategy": strategy})})


def _fp32(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"transfer": config.transfer.model_copy(update={"codec": "fp32"})})


def _rows(config: RunConfig, measured: Measured) -> list[Record]:
    stages = enumerate(stage_traffic(config), 1)
    return [
        {**asdict(stage_cost(config, stage, measured)), "bytes_down": one.down, "bytes_up": one.up, "bytes_to_join": one.joining}
        for stage, one in stages
    ]


def _total(config: RunConfig, measured: Measured, rows: list[Record], fp32_end_to_end: int) -> Record:
    sent = sum(row["bytes_down"] + row["bytes_up"] for row in rows)
    return {
        **{name: sum(row[name] for row in rows) for name in ("gflops_paper", "gflops_true")},
        "comm_gb_paper": paper_bytes(config, measured) / PAPER_GB,
        "comm_gb_paper_worst": paper_bytes(config, measured, worst=True) / PAPER_GB,
        "comm_bytes": sent,
        "comm_ratio": fp32_end_to_end / sent,
        "memory_mb": max(row["memory_mb"] for row in rows),
    }


def _table(config: RunConfig, report: Record) -> Iterator[str]:
    model = config.model
    layers = f"{model.backbone} of {model.depth} layers, {model.image_size} x {model.image_size} pixels, batch {config.train.batch_size}"
    yield f"{config.run.name}: {config.ssl.method}, {layers}; * as configured\n"
    yield f"{'':14}{'times less than end_to_end':>32}{'a device in the whole run':>43}"
    names = ("GFLOPs", "paper's", "bytes", "memory", "GFLOPs", "paper's", "paper GB", "worst", "MB sent", "memory")
    yield _line(names, _WIDTHS, "")
    for strategy, one in report["totals"].items():
        ratios = [f"{one[name]:.2f}x" for name in ("gflops_true_ratio", "gflops_paper_ratio", "comm_ratio", "memory_mb_ratio")]
        macs = [_short(one[name]) for name in ("gflops_true", "gflops_paper")]
        comm = [f"{one[name]:.2f}" for name in ("comm_gb_paper", "comm_gb_paper_worst")]
        sent = [_short(one["comm_bytes"] / 1e6), f"{one['memory_mb']:.0f}"]
        yield _line((*ratios, *macs, *comm, *sent), _WIDTHS, _marked(report, strategy))
    for strategy in report["totals"]:
        yield f"\n{_marked(report, strategy)}"
        yield _line(
            ("stage", "layers", "rounds", "parameters", "trained", "GFLOPs", "paper's", "MB down", "MB up", "to join", "memory"), _STAGE
        )
        for row in report["rows"]:
            if row["strategy"] == strategy:
                yield _stage(row)
    yield "\nGFLOPs: 10^9 multiply-accumulates for each image of the device over all local epochs, as computed;"
    yield "paper's: as the paper counts. paper GB: its account of Table 2; worst: of Table 5."
    codec = config.transfer.codec
    written = codec if codec == "fp32" else f"differences in {codec} not yet compressed"
    yield f"MB down, up, sent: on our wire, {written};"
    yield "to join: what a device that holds nothing fetches."
    yield "memory: MB that training takes, an estimate."
    for strategy, why in report["obstacles"].items():
        yield from wrap(f"{strategy} cannot run like this: {why}", 99)


_WIDTHS = (8, 8, 8, 8, 9, 9, 9, 8, 10, 8)
_STAGE = (6, 7, 7, 11, 11, 9, 9, 9, 9, 9, 9)


def _line(cells: Iterable[str], widths: Sequence[int], title: str | None = None) -> str:
    return ("" if title is None else f"{title:14}") + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.2f}"


def _marked(report: Record, strategy: str) -> str:
    return f"{'*' if strategy == report['strategy'] else ' '} {strategy}"


def _stage(row: Record) -> str:
    counts = [f"{row[name]}" for name in ("stage", "layers", "rounds", "parameters", "trained")]
    macs = [_short(row[name]) for name in ("gflops_true", "gflops_paper")]
    sent = [_short(row[name] / 1e6) for name in ("bytes_down", "bytes_up", "bytes_to_join")]
    return _line((*counts, *macs, *sent, f"{row['memory_mb']:.0f}"), _STAGE)
