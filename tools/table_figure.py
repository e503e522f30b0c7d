"""The picture of a table: the accuracy of every row, with the standard deviation over its seeds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from PIL import Image

from lwfed.tools.figure import BLUE, GREEN, GREY, png

if TYPE_CHECKING:
    from lwfed.tools.tables import Result

ROW_INCHES = 0.24
COLOURS = 64  # of text, two lines and two markers, with what smooths their edges


def draw(heading: str, found: Sequence[Result]) -> bytes:
    """PNG bytes; rows from top to bottom as in the table."""
    figure = Figure(figsize=(6.5, 1.3 + ROW_INCHES * len(found)), layout="constrained")
    axes = figure.subplots()
    for name, label, colour, shift, marker in (("knn", "kNN", GREEN, -0.12, "o"), ("probe", "linear probe", BLUE, 0.12, "s")):
        known = [(place, result.summary["total"][name]) for place, result in enumerate(found) if result.summary["total"][name] is not None]
        means, spreads = ([100 * value[part] for _, value in known] for part in ("mean", "spread"))
        axes.errorbar(means, [place + shift for place, _ in known], xerr=spreads, fmt=marker, color=colour, label=label, markersize=5)
        if (random := found[0].summary["random"]) is not None and random[name] is not None:
            axes.axvline(100 * random[name]["mean"], color=colour, linestyle=":", linewidth=1, label=f"random weights, {label}")
    axes.set_yticks(range(len(found)), [f"{result.title} ({len(result.report['seeds'])})" for result in found], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="x", color=GREY, alpha=0.3)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("accuracy of the frozen encoder, %; in brackets: seeds", fontsize=8)
    figure.suptitle(heading, x=0.01, ha="left", fontsize=10, fontweight="bold")  # the axes leave it too little room
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return in_few_colours(png(figure))


def in_few_colours(picture: bytes) -> bytes:
    """The PNG with a palette, a third of its size: for pages that are kept under version control."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(COLOURS).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
