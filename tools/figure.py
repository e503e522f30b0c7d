"""The picture of a demo: what is learnt stage by stage, and what it costs a device."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lwfed.tools.account import total, training_mb

matplotlib.use("Agg")
GREEN, BLUE, ORANGE, GREY = "#1b7f5c", "#2f6fb0", "#c8641b", "#8a8f98"
DOTS_PER_INCH = 150
PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # keeps a number readable on a line


def draw(report: Mapping[str, Any]) -> bytes:
    """PNG bytes."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    accuracy, memory, traffic = figure.subplots(1, 3, width_ratios=[1.25, 1, 1])
    _accuracy(accuracy, report)
    _memory(memory, report)
    _traffic(traffic, report)
    return png(figure)


def png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def _accuracy(axes: Axes, report: Mapping[str, Any]) -> None:
    points = [report["random"], *report["stages"]]
    lower = min("knn", "probe", key=lambda name: points[-1][name])
    for name, label, colour in (("knn", "kNN", GREEN), ("probe", "linear probe", BLUE)):
        values = [100 * point[name] for point in points]
        axes.plot(values, "o-", color=colour, label=label)
        offset, side = (-1, "top") if name == lower else (1, "bottom")  # of its point, so that they do not cover each other
        end = len(values) - 1, values[-1]
        axes.annotate(f"{values[-1]:.0f} %", end, xytext=(7, offset), textcoords="offset points", va=side, color=colour, bbox=PLAIN)
    for name, label, style in (("end_to_end", "end to end, kNN", "--"), ("raw_pixels", "raw pixels, kNN", ":")):
        axes.axhline(100 * report[name]["knn"], color=GREY, linestyle=style, label=label)
    title(axes, "Accuracy on digits no device has seen")
    axes.set(ylabel="%", ylim=(0, 107), xlim=(-0.2, len(points) - 0.4))
    axes.set_xticks(range(len(points)), ["random\nweights", *(f"stage {record['stage']}" for record in report["stages"])])
    axes.legend(frameon=False, loc="lower right")


def _memory(axes: Axes, report: Mapping[str, Any]) -> None:
    records, labels = [*report["stages"], report["end_to_end"]], _labels(report)
    colours = [GREEN] * len(report["stages"]) + [ORANGE]
    base = [record["worker_baseline_mb"] for record in records]
    extra = [training_mb(record) for record in records]
    axes.bar(labels, base, color="white", edgecolor=GREY, hatch="///", label="Python and torch, before data")
    bars = axes.bar(labels, extra, bottom=base, color=colours)
    axes.bar_label(bars, [f"+{value:.0f}" for value in extra], padding=2)
    title(axes, "Peak memory of a device's worker")
    axes.set(ylabel="MB", ylim=(0, 1.35 * max(b + e for b, e in zip(base, extra, strict=True))))
    axes.legend(frameon=False, loc="upper left")


def _traffic(axes: Axes, report: Mapping[str, Any]) -> None:
    records = [*report["stages"], total(report["stages"]), report["end_to_end"]]
    labels = [*_labels(report)[:-1], "all\nstages", "end to\nend"]
    down, up = ([record[name] / 1e6 for record in records] for name in ("bytes_down", "bytes_up"))
    colours = [GREEN] * (len(records) - 1) + [ORANGE]
    axes.bar(labels, down, color=colours, label="down")
    bars = axes.bar(labels, up, bottom=down, color=colours, alpha=0.5, label="up (lighter)")
    totals = [a + b for a, b in zip(down, up, strict=True)]
    axes.bar_label(bars, [f"{total:.{1 if total < 10 else 0}f}" for total in totals], padding=2)
    title(axes, "Bytes on the wire, per device")
    axes.set_ylabel("MB")
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="upper left")


def title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=11, fontweight="bold")


def _labels(report: Mapping[str, Any]) -> list[str]:
    return [*(f"stage\n{record['stage']}" for record in report["stages"]), "end to\nend"]
