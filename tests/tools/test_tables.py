"""Tables of simulations: their files, the order of their runs, and what stands in them."""

import json
import re
from dataclasses import replace
from importlib import resources

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from lwfed.config import load_config
from lwfed.errors import ConfigError
from lwfed.tools import tables
from lwfed.tools.cli import main
from lwfed.tools.simulation.command import command_line, plan
from lwfed.tools.simulation.records import summarise
from lwfed.tools.tables import expanded, load_table, replaced

NAMES = sorted(entry.name.removesuffix(".yaml") for entry in resources.files("lwfed.configs").joinpath("tables").iterdir())
SETTINGS = ["calibration.every=never"]
ROWS = [
    {"name": "plain", "title": "layer-wise"},
    {"name": "whole", "title": "end-to-end", "set": ["stages.strategy=end_to_end"], "dropout": 0.25},
]


def file_of(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(
        yaml.safe_dump({"title": "Small", "config": "demo", "data": "digits", "seeds": [3, 4], "set": SETTINGS, "rows": ROWS} | changes)
    )
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_row_of_our_tables_is_a_valid_run_and_has_equal_local_epochs(name):
    table = load_table(name)
    configs = [load_config(table.config, [*table.set, *row.set]) for row in table.rows]
    assert len({sum(config.round_counts) * config.train.epochs for config in configs}) == 1


def simulated(told):
    """What `simulate` leaves, of a run that took no time."""
    config = next(iter(plan(told).values()))
    scores, stage = (
        {"knn": 0.25, "probe": 0.5},
        {"worker_peak_mb": 300.0, "worker_baseline_mb": 250.0, "bytes_down": 2_000_000, "bytes_up": 1_000_000},
    )
    strategy = config.stages.strategy
    runs = [
        {"strategy": strategy, "seed": seed, "random": scores, "raw_pixels": None,
         "stages": [{"stage": 1, "collapsed": False, "knn": 0.5 + seed / 100, "probe": None, "seconds": 7.0, **stage}]}
        for seed in told.seeds
    ]  # fmt: skip
    machine = {"processor": "p", "cores": 2, "memory_mb": 1, "accelerator": None, "system": "s", "python": "3"}
    report = {"summary": {strategy: summarise(runs)}, "seeds": told.seeds, "machine": machine, "versions": {"torch": "2"}}
    report |= {"command": command_line(told), "config": config.model_dump(mode="json")}
    told.out.mkdir(parents=True, exist_ok=True)
    (told.out / "report.json").write_text(json.dumps(report))


def test_all_rows_have_their_first_seed_before_any_has_its_second(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(tables, "simulate", lambda one: (told.append((one.out.name, one.seeds)), simulated(one)))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: small -->\nold\n<!-- end -->\nafter\n")
    words = ["table", str(file_of(tmp_path)), "--out", str(tmp_path / "out"), "--into", str(page)]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert told == [("plain", (3,)), ("whole", (3,)), ("plain", (3, 4)), ("whole", (3, 4))]
    text = page.read_text()
    assert re.fullmatch("before\n<!-- table: small -->\n.*<!-- end -->\nafter\n", text, re.DOTALL)
    assert "old" not in text
    assert "| random weights | 2 | 25.0 ± 0.0 | 50.0 ± 0.0 |" in text
    assert "| end-to-end | 2 | 53.5 ± 0.7 | - | 50 | 2.0 | 1.0 | 7 |" in text
    assert "--dropout=0.25 --seeds=3,4 " in text
    with Image.open(tmp_path / "out" / "table.png") as picture:
        assert picture.format == "PNG"
    assert (tmp_path / "figures" / "small.png").read_bytes() == (tmp_path / "out" / "table.png").read_bytes()
    told.clear()
    assert CliRunner().invoke(main, [*words, "--seeds", "3"], catch_exceptions=False).exit_code == 0
    assert told == []  # all of it is there, and no seed is taken away
    assert page.read_text() == text
    file_of(tmp_path, rows=[ROWS[0], {**ROWS[1], "dropout": 0.5}])
    monkeypatch.setattr(tables, "simulate", lambda one: told.append((one.out.name, one.seeds)))
    assert CliRunner().invoke(main, words, catch_exceptions=False).exit_code == 0
    assert told == [("whole", (3,)), ("whole", (3, 4))]
    assert "end-to-end" not in page.read_text()  # what is there is of another drop-out


@pytest.mark.parametrize(
    ("changes", "page", "says"),
    [
        ({"rows": [ROWS[0], {**ROWS[1], "set": ["data.partition=any"]}]}, "", "data.partition"),
        ({"rows": [ROWS[0], {**ROWS[1], "set": ["calibration.data=$NOWHERE"]}]}, "", "NOWHERE is not set"),
        ({}, "no place", "the page has no place for this table"),
    ],
)
def test_mistakes_are_found_before_the_first_run(tmp_path, monkeypatch, changes, page, says):
    monkeypatch.setattr(tables, "simulate", lambda one: pytest.fail("a run began"))
    (tmp_path / "page.md").write_text(page)
    words = ["table", str(file_of(tmp_path, **changes)), "--out", str(tmp_path / "out"), "--into", str(tmp_path / "page.md")]
    done = CliRunner().invoke(main, words)
    assert says in done.output
    assert done.exit_code == 78


def test_a_row_that_was_not_run_is_not_in_the_table(tmp_path):
    first, second = load_table(str(file_of(tmp_path))).rows
    told = tables.Simulation("demo", (), tmp_path / "first", "digits", 0.0, (0,), None, 1, None)
    simulated(told)
    assert [result.title for result in tables.results({first: told, second: replace(told, out=tmp_path / "second")})] == ["layer-wise"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": [ROWS[0], ROWS[0]]}, "two rows are called plain"),
        ({"rows": []}, "rows: "),
        ({"sets": []}, "sets: no such key; did you mean set"),
        ({"rows": [{"name": "a/b", "title": "x"}]}, "rows.0.name"),
    ],
)
def test_a_wrong_table_is_refused(changes, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        load_table(str(file_of(tmp_path, **changes)))


def test_an_unknown_table_names_those_there_are():
    with pytest.raises(ConfigError, match=r"'digit' cannot be read .*tables: .*digits"):
        load_table("digit")


def test_variables_are_expanded_where_it_runs(monkeypatch, tmp_path):
    told = tables.Simulation("demo", ("calibration.data=$PICTURES/a",), tmp_path, "$PICTURES/b.npz", 0.0, (0,), None, 1, None)
    monkeypatch.setenv("PICTURES", "/srv")
    assert (expanded(told).data, expanded(told).settings) == ("/srv/b.npz", ("calibration.data=/srv/a",))
    monkeypatch.delenv("PICTURES")
    with pytest.raises(ConfigError, match=r"\$PICTURES is not set"):
        expanded(told)


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ConfigError, match="<!-- table: digits -->"):
        replaced("<!-- table: other -->\n<!-- end -->\n", "digits", "text")
