"""The picture of a split: one bar a share, divided by class; devices above, the server below on a scale of its own."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgba
from matplotlib.figure import Figure

from lwfed.tools.figure import DOTS_PER_INCH, GREEN, GREY
from lwfed.tools.split import Counts, Split

WIDTH_INCHES = 9
BAR_INCHES = 0.28
FRAME_INCHES = 0.75  # title or axis of a panel
MAX_INCHES = 60  # some 200 devices; beyond, bars get thinner
MAX_LEGEND = 20  # classes with a colour that is told apart; beyond, they are a range of colours
MANY = matplotlib.colormaps["viridis"]
NUMBER_SHARE = 0.035  # of the longest bar: what is narrower has no room for its number
RED = "#b3261e"
WORDS = {"unfit": "  not asked to train", "few": "  less than a batch"}

Colours = Sequence[tuple[float, float, float, float]]


def draw_split(split: Split) -> bytes:
    """PNG bytes."""
    panels = [([f"device {number}" for number in range(len(split.devices))], split.devices)]
    if split.server:
        panels.append(([f"server: {name}" for name in split.server], np.array([*split.server.values()])))
    heights = [FRAME_INCHES + BAR_INCHES * len(names) for names, _ in panels]
    figure = Figure(figsize=(WIDTH_INCHES, min(0.3 + sum(heights), MAX_INCHES)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (names, counts) in zip(all_axes, panels, strict=True):
        _bars(axes, split, counts)
        axes.set(xlabel="images", xlim=(0, 1.12 * max(1, counts.sum(axis=1).max())), ylim=(len(counts) - 0.5, -0.5))
        axes.set_yticks(range(len(counts)), names)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    for device, total in enumerate(split.devices.sum(axis=1)):
        remark = split.remark(device)
        _total(all_axes[0], total, device, WORDS.get(remark, ""), {"unfit": RED, "few": GREY}.get(remark, "black"))
    for place, counts in enumerate(split.server.values()):
        _total(all_axes[1], counts.sum(), place)
    all_axes[0].set_title(f"{split.data}: {split.title}", loc="left", fontsize=11, fontweight="bold")
    _legend(figure, all_axes, split)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def _bars(axes: Axes, split: Split, counts: Counts) -> None:
    """`counts` [shares, classes], from the top down."""
    room = NUMBER_SHARE * counts.sum(axis=1).max()
    numbered = 1 < len(split.classes) <= MAX_LEGEND
    left = np.zeros(len(counts))
    for name, held, colour in zip(split.classes, counts.T, _colours(split), strict=True):
        bars = axes.barh(range(len(counts)), held, left=left, height=0.8, color=colour, label=name, linewidth=0)
        if numbered:
            dark = np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.55
            labels = [str(count) if count >= max(1, room) else "" for count in held]
            axes.bar_label(bars, labels, label_type="center", fontsize=7, color="white" if dark else "black")
        left = left + held


def _total(axes: Axes, total: int, place: int, words: str = "", colour: str = "black") -> None:
    axes.annotate(f"{total}{words}", (total, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9, color=colour)


def _legend(figure: Figure, all_axes: Any, split: Split) -> None:
    if 1 < len(split.classes) <= MAX_LEGEND:
        figure.legend(*all_axes[0].get_legend_handles_labels(), title="class", frameon=False, loc="outside right upper", fontsize=8)
    elif len(split.classes) > MAX_LEGEND:
        bar = figure.colorbar(ScalarMappable(Normalize(0, len(split.classes) - 1), MANY), ax=list(all_axes), fraction=0.03, pad=0.02)
        bar.set_label("class")


def _colours(split: Split) -> Colours:
    """RGBA of each class."""
    count = len(split.classes)
    if count == 1:
        return [to_rgba(GREEN)]
    if count <= MAX_LEGEND:
        some = matplotlib.colormaps["tab10" if count <= 10 else "tab20"]
        return [some(number) for number in range(count)]
    return [MANY(number / (count - 1)) for number in range(count)]
