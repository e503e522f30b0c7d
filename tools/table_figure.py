"""The picture of a table: the accuracy of every row, with the standard deviation over its seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from lwfed.tools.figure import BLUE, GREEN, GREY, png, title

if TYPE_CHECKING:
    from lwfed.tools.tables import Result

ROW_INCHES = 0.32


def draw(heading: str, found: Sequence[Result]) -> bytes:
    """PNG bytes; rows from top to bottom as in the table."""
    figure = Figure(figsize=(8, 1.4 + ROW_INCHES * len(found)), layout="constrained")
    axes = figure.subplots()
    for name, label, colour, shift, marker in (("knn", "kNN", GREEN, -0.12, "o"), ("probe", "linear probe", BLUE, 0.12, "s")):
        known = [(place, result.summary["total"][name]) for place, result in enumerate(found) if result.summary["total"][name] is not None]
        means, spreads = ([100 * value[figure] for _, value in known] for figure in ("mean", "spread"))
        axes.errorbar(means, [place + shift for place, _ in known], xerr=spreads, fmt=marker, color=colour, label=label, capsize=2)
        if (random := found[0].summary["random"]) is not None and random[name] is not None:
            axes.axvline(100 * random[name]["mean"], color=colour, linestyle=":", linewidth=1, label=f"random weights, {label}")
    axes.set_yticks(range(len(found)), [f"{result.title} ({len(result.report['seeds'])})" for result in found])
    axes.invert_yaxis()
    axes.grid(axis="x", color=GREY, alpha=0.3)
    axes.set_xlabel("% of the frozen encoder; in brackets: seeds")
    title(axes, heading)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25 + 0.012 * len(found)), ncols=2)
    return png(figure)
