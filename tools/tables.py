"""``lwfed table``: simulations that are compared, a row each. What is finished is not made again, so it may be ended and gone on with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import click
import yaml
from pydantic import Field, ValidationError, field_validator

from lwfed.config.explain import explain
from lwfed.config.schema import Section
from lwfed.console import counted
from lwfed.errors import ConfigError, StateError
from lwfed.tools.machine import needed
from lwfed.tools.simulation.command import Simulation, command_line, plan, simulate

Words = Annotated[str, Field(min_length=1)]
VARIABLE = re.compile(r"\$\w+|\$\{\w+\}")


class Row(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]  # also of its folder
    title: Words
    set: tuple[Words, ...] = ()
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Table(Section):
    """A file of `configs/tables`. `data` and settings may name environment variables: ``$DATA/blood.npz``."""

    title: Words
    config: Words
    data: Words
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    set: tuple[Words, ...] = ()  # of all rows
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]

    @field_validator("rows")
    @classmethod
    def _distinct(cls, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        names = [row.name for row in rows]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two rows are called {', '.join(sorted(twice))}: every row has a folder of its own")
        return rows


@dataclass(frozen=True)
class Result:
    """A row of which at least one seed is finished; `report` is that of `lwfed simulate`."""

    title: str
    command: str
    report: Mapping[str, Any]

    @property
    def summary(self) -> Mapping[str, Any]:
        (summary,) = self.report["summary"].values()
        found: Mapping[str, Any] = summary
        return found


def load_table(name: str) -> Table:
    """The table of that name or file. Raises ConfigError."""
    folder = resources.files("lwfed.configs").joinpath("tables")
    known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir())
    try:
        text = (folder.joinpath(f"{name}.yaml") if name in known else Path(name)).read_text("utf-8")
        return Table.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        raise ConfigError(explain(error, name, Table)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"table {name!r} cannot be read ({error}); tables: {', '.join(known)}; or give the path of a YAML file") from None


def make_table(name: str, out: Path, seeds: tuple[int, ...] | None, into: Path | None, workers: int | None, device: str | None) -> None:
    """All rows with the first seed, then all of them with the second, and so on; table.md and table.png are renewed after each.

    Mistakes in any row, or in the page, are found before the first run. Raises ConfigError and what `simulate` raises.
    """
    draw = needed("lwfed.tools.table_figure", "a table").draw
    table = load_table(name)
    seeds = seeds or table.seeds
    rows = {
        row: Simulation(table.config, (*table.set, *row.set), out / row.name, table.data, row.dropout, seeds, None, workers, device)
        for row in table.rows
    }
    for told in rows.values():
        plan(expanded(told))
    if into is not None:
        replaced(_read(into), Path(name).stem, "")
    for count in range(1, 1 + len(seeds)):
        for row, told in rows.items():
            click.echo(f"\n{row.title}, {counted(count, 'seed')} of {len(seeds)}")
            made = _report(told)
            if made is None or not set(seeds[:count]) <= set(made["seeds"]):
                simulate(expanded(replace(told, seeds=seeds[:count])))
            write(name, out, into, table, list(results(rows)), draw)


def expanded(told: Simulation) -> Simulation:
    """With the values of environment variables. Raises ConfigError for one that is not set."""
    texts = [os.path.expandvars(text) for text in (told.data, *told.settings)]
    for text in texts:
        if missing := VARIABLE.search(text):
            raise ConfigError(f"{text}: {missing[0]} is not set: export it, as the first lines of the table say")
    return replace(told, data=texts[0], settings=tuple(texts[1:]))


def results(rows: Mapping[Row, Simulation]) -> Iterator[Result]:
    for row, told in rows.items():
        if report := _report(told):
            command = command_line(replace(told, seeds=tuple(report["seeds"]), device=None))
            yield Result(row.title, command.replace("'", '"'), report)  # a shell expands variables in these quotes


def _report(told: Simulation) -> Mapping[str, Any] | None:
    """What is there of a row; None if there is nothing, or of other settings."""
    file = told.out / "report.json"
    if not file.is_file():
        return None
    report: Mapping[str, Any] = json.loads(file.read_text())
    told = replace(expanded(told), seeds=tuple(report["seeds"]))
    config = next(iter(plan(told).values()))
    same = (report["command"], report["config"]) == (command_line(told), config.model_dump(mode="json"))
    return report if same else None


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except OSError as error:
        raise StateError(f"cannot read {page}: {error.strerror or error}") from None


def write(name: str, out: Path, into: Path | None, table: Table, found: Sequence[Result], draw: Any) -> None:
    """table.md and table.png in `out`; with `into` also in place of the block of that page that is marked with the table's name, and in
    figures/ beside it."""
    text, picture, stem = markdown(table, found), draw(table.title, found), Path(name).stem
    try:
        (out / "table.md").write_text(text, encoding="utf-8")
        (out / "table.png").write_bytes(picture)
        if into is not None:
            into.write_text(replaced(_read(into), stem, text), encoding="utf-8")
            (into.parent / "figures").mkdir(exist_ok=True)
            (into.parent / "figures" / f"{stem}.png").write_bytes(picture)
    except OSError as error:
        raise StateError(f"cannot write {error.filename}: {error.strerror or error}; check free space and permissions") from None


def replaced(page: str, name: str, text: str) -> str:
    """`page` with `text` between ``<!-- table: name -->`` and ``<!-- end -->``. Raises ConfigError where it has no such place."""
    begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
    before, found, rest = page.partition(begin)
    if not found or end not in rest:
        raise ConfigError(f"the page has no place for this table: write {begin.strip()} and {end} on lines of their own")
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def markdown(table: Table, found: Sequence[Result]) -> str:
    """Of finished rows only: accuracy at the end, cost of a run, then the commands."""
    lines = ["| | seeds | kNN % | probe % | training MB | MB down | MB up | s |", "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for base, title in (("random", "random weights"), ("raw_pixels", "raw pixels")):
        if found[0].summary[base] is not None:
            lines.append(_row(title, found[0], found[0].summary[base]))
    lines += [_row(result.title, result, result.summary["total"]) for result in found]
    lines += ["", "```sh", *(f"{result.command}" for result in found), "```", ""]
    first = found[0].report
    machine = "{processor}, {cores} cores, {memory_mb} MB, {system}, Python {python}".format(**first["machine"])
    if first["config"]["worker"]["device"] != "cpu" and first["machine"]["accelerator"]:
        machine += f", {first['machine']['accelerator']}"
    lines.append(f"{machine}; {', '.join(f'{package} {version}' for package, version in first['versions'].items())}.")
    return "\n".join(lines) + "\n"


def _row(title: str, result: Result, record: Mapping[str, Any]) -> str:
    seeds = len(result.report["seeds"])
    cells = [title.replace("|", "\\|"), str(seeds), *(_percent(record[figure], seeds) for figure in ("knn", "probe"))]
    if "seconds" in record:
        memory = record["worker_peak_mb"]["mean"] - record["worker_baseline_mb"]["mean"]
        cells += [f"{memory:.0f}", *(f"{record[name]['mean'] / 1e6:.1f}" for name in ("bytes_down", "bytes_up"))]
        cells.append(f"{record['seconds']['mean']:.0f}")
    return f"| {' | '.join(cells + [''] * (8 - len(cells)))} |"


def _percent(figure: Mapping[str, float] | None, seeds: int) -> str:
    if figure is None:
        return "-"
    return f"{100 * figure['mean']:.1f}" + (f" ± {100 * figure['spread']:.1f}" if seeds > 1 else "")
