"""A profile as one HTML page that needs nothing beside it; its figures are SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from lwfed.edge_agent.profiling.cases import PAPER_LESS, largest, measured
from lwfed.edge_agent.profiling.condition import Condition
from lwfed.plan import Strategy

Record = Mapping[str, Any]
GREEN, ORANGE, GREY = "#1b7f5c", "#c8641b", "#8a8f98"
WIDTH, LABEL, BAR = 720, 230, 22  # pixels
FAR = 2  # times the longest bar: a mark further off is not drawn, for it would make the bars short


def page(report: Mapping[str, Any]) -> str:
    """Fill page.html with the figures of `report`."""
    found = measured(report["cases"])
    budget_mb = report["budget_mb"]
    memory = [(name(one), (one["memory"]["baseline_mb"], one["memory"]["training_mb"]), one["fits"]) for one in found]
    times = [(name(one), (0.0, one["step_s"]), True) for one in found]
    template = Template(resources.files("lwfed.edge_agent.profiling").joinpath("page.html").read_text("utf-8"))
    machine = report["machine"]
    return template.substitute(
        config=escape(report["config"]),
        batch=report["batch_size"],
        images=report["images"],
        steps=report["steps"],
        interrupted=f"<p><b>{escape(report['interrupted'])}</b></p>" if report["interrupted"] else "",
        codec=escape(report["codec"]),
        advice="\n".join(f"<li>{escape(text)}</li>" for text in report["recommended"]["texts"]),
        memory=bars(memory, "MB", budget_mb),
        budget=_budget(budget_mb, max((sum(parts) for _, parts, _ in memory), default=0.0)),
        times=bars(times, "s"),
        rows="\n".join(_row(one) for one in report["cases"]),
        reasons="\n".join(f"<li>{escape(text)}</li>" for text in reasons(report["cases"])),
        paper="\n".join(_paper(report["paper"], found)),
        before=escape(Condition(**report["before"]).text),
        after=escape(Condition(**report["after"]).text),
        machine=escape("{processor}, {cores} cores, {memory_mb} MB, {system}, Python {python}, torch {torch}".format(**machine)),
    )


def name(record: Record) -> str:
    limit = "" if record["limit_mb"] is None else f", {record['limit_mb']} MB"
    return f"{record['strategy']} {record['stage']}, {record['threads']} thr.{limit}"


def reasons(records: Sequence[Record]) -> list[str]:
    """Why each measured case is computed as it is."""
    return [f"{name(record)}: {record['planned']['reason']}" for record in measured(records)]


def bars(rows: Sequence[tuple[str, tuple[float, float], bool]], unit: str, mark: float | None = None) -> str:
    """An SVG of one bar a row, its first part pale and its second coloured, orange where it does not fit; a line at `mark`."""
    if not rows:
        return "<p>Nothing was measured.</p>"
    top = max(sum(parts) for _, parts, _ in rows)
    if mark is not None and mark <= FAR * top:
        top = max(top, mark)
    scale = (WIDTH - LABEL - 90) / (1.02 * top)
    height = BAR * len(rows) + 8
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        + "".join(_bar(index, row, scale, unit) for index, row in enumerate(rows))
        + (_line(LABEL + mark * scale, height, mark, unit) if mark is not None and mark <= top else "")
        + "</svg>"
    )


def _budget(mb: float, longest: float) -> str:
    return f"Dashed: the budget of {mb:.0f} MB." if mb <= FAR * longest else f"The budget of {mb:.0f} MB lies further to the right."


def _bar(index: int, row: tuple[str, tuple[float, float], bool], scale: float, unit: str) -> str:
    text, (first, second), fits = row
    y, middle, tall = BAR * index + 4, BAR * index + 4 + BAR * 0.6, BAR - 6
    value = f"{first + second:.0f} {unit}" if first + second >= 100 else f"{first + second:.2f} {unit}"
    return (
        f'<text x="{LABEL - 8}" y="{middle:.1f}" text-anchor="end">{escape(text)}</text>'
        f'<rect x="{LABEL}" y="{y}" width="{first * scale:.1f}" height="{tall}" fill="{GREY}" fill-opacity="0.4"/>'
        f'<rect x="{LABEL + first * scale:.1f}" y="{y}" width="{second * scale:.1f}" height="{tall}" fill="{GREEN if fits else ORANGE}"/>'
        f'<text x="{LABEL + (first + second) * scale + 6:.1f}" y="{middle:.1f}">{value}</text>'
    )


def _line(x: float, height: int, value: float, unit: str) -> str:
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="{ORANGE}" stroke-dasharray="4 3">'
        f"<title>budget {value:.0f} {unit}</title></line>"
    )


def _row(record: Record) -> str:
    head = f'<tr><th scope="row">{escape(name(record))}</th>'
    if "memory" not in record:
        return f'{head}<td colspan="11" class="reason">{escape(record["reason"])}</td></tr>'
    memory, group = record["memory"], record["memory"]["group_peak_mb"]
    cells = [f"{memory[key]:.0f}" for key in ("peak_mb", "baseline_mb", "training_mb", "swap_mb", "files_mb")]
    cells += ["" if group is None else f"{group:.0f}", f"{record['step_s']:.2f}", f"{record['epoch_s']:.1f}"]
    cells.append(f"{record['bytes_down'] / 1e6:.1f} / {record['bytes_up'] / 1e6:.1f}")
    cells += [record["planned"]["prefix"], str(record["planned"]["micro_batch"])]
    return head + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _beside(own: Sequence[Record]) -> list[str]:
    """Of the cases of one strategy: largest peak, mean operations of a step, mean bytes of a round."""
    gmacs = sum(record["gmacs"] for record in own) / len(own)
    travels = sum(record["bytes_down"] + record["bytes_up"] for record in own) / len(own)
    return [f"{largest(own):.0f}", f"{gmacs:.3g}", f"{travels / 1e6:.1f}"]


def _paper(paper: Mapping[Strategy, Mapping[str, float]], found: Sequence[Record]) -> Iterator[str]:
    for strategy, row in paper.items():
        less = {key: f" ({factor:.2f}x less)" for key, factor in PAPER_LESS.get(strategy, {}).items()}
        cells = [f"{row[key]:g}{less.get(key, '')}" for key in row]
        own = [record for record in found if record["strategy"] == strategy]
        cells += _beside(own) if own else ["not measured", "", ""]
        yield f'<tr><th scope="row">{strategy}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
