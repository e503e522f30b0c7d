"""The picture of simulated runs: what is lost and what is learnt, round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lwfed.tools.figure import BLUE, GREEN, GREY, ORANGE, png, title
from lwfed.tools.screen import TITLES

COLOURS = {"layer_wise": GREEN, "progressive": BLUE, "end_to_end": ORANGE}

Runs = Sequence[Mapping[str, Any]]


def draw(report: Mapping[str, Any]) -> bytes:
    """PNG bytes: the loss of each round, and accuracy at stage ends; of several seeds the mean, with the range of all shaded."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for strategy in report["summary"]:
        runs = [run for run in report["runs"] if run["strategy"] == strategy]
        _loss(loss, runs, COLOURS[strategy], TITLES[strategy])
        _accuracy(accuracy, runs, COLOURS[strategy], TITLES[strategy])
    _baselines(accuracy, report["runs"])
    title(loss, "Mean training loss of a round")
    loss.set(xlabel="round")
    title(accuracy, "Accuracy of the frozen encoder")
    accuracy.set(xlabel="round", ylabel="%", ylim=(0, 102))
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    return png(figure)


def _loss(axes: Axes, runs: Runs, colour: str, label: str) -> None:
    places = range(1, 1 + min(len(run["rounds"]) for run in runs))
    _curve(axes, places, [[one["loss"] for one in run["rounds"]] for run in runs], color=colour, label=label, marker=".")
    for end in _stage_ends(runs[0])[:-1]:
        axes.axvline(end + 0.5, color=colour, linewidth=0.5, alpha=0.5)


def _accuracy(axes: Axes, runs: Runs, colour: str, label: str) -> None:
    for name, what, style in (("knn", "kNN", "o-"), ("probe", "linear probe", "s--")):
        if any(stage[name] is None for run in runs for stage in run["stages"]):
            continue
        points = [[100 * run["random"][name], *(100 * stage[name] for stage in run["stages"])] for run in runs]
        _curve(axes, [0, *_stage_ends(runs[0])], points, style, color=colour, label=f"{label}, {what}")


def _baselines(axes: Axes, runs: Runs) -> None:
    for name, label, style in (("random", "random weights, kNN", ":"), ("raw_pixels", "raw pixels, kNN", "-.")):
        found = [run[name]["knn"] for run in runs if run[name] is not None]
        if found:
            axes.axhline(100 * sum(found) / len(found), color=GREY, linestyle=style, label=label)


def _curve(axes: Axes, places: Sequence[int], series: Sequence[Sequence[float]], *style: str, color: str, **more: Any) -> None:
    columns = list(zip(*series, strict=False))
    axes.plot(places, [sum(column) / len(column) for column in columns], *style, color=color, markersize=4, **more)
    if len(series) > 1:
        axes.fill_between(places, [min(column) for column in columns], [max(column) for column in columns], color=color, alpha=0.15)


def _stage_ends(run: Mapping[str, Any]) -> list[int]:
    """Rounds of the run that are over at the end of each stage."""
    return list(accumulate(sum(one["stage"] == stage["stage"] for one in run["rounds"]) for stage in run["stages"]))
