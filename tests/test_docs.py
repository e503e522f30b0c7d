"""What the documentation says, held against the programs: its commands, configurations, code and tables."""

import contextlib
import re
import shlex
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import pytest

from lwfed import errors
from lwfed.backbones import CONVOLUTIONAL
from lwfed.cloud_server.checkpoint import export
from lwfed.config import load_config, presets
from lwfed.data.torchvision_sets import import_torchvision
from lwfed.models.shapes import part_shapes
from lwfed.tools.tables import load_table
from lwfed.wire import messages, tensors, topics

from .pages import FENCE, PAGES, PROGRAMS, ROOT, blocks, check, commands, page

SHELL = {"pip", "scp", "python3", "make", "openssl", "echo", "chmod", "export", "sed", "sudo", "mosquitto", "mosquitto_passwd"}
LANGUAGES = {"sh", "yaml", "python", "text"}


def inline_commands():
    """Commands of our programs in running text."""
    for path in PAGES:
        prose = FENCE.sub("", path.read_text(encoding="utf-8"))
        for quoted in re.findall(r"`([^`\n]+)`", prose):
            words = quoted.split()
            if words[0] in PROGRAMS and len(words) > 1:
                yield pytest.param(words, id=f"{path.name}-{quoted}")


def settings_of(words):
    return [value for flag, value in pairwise(words) if flag == "--set"] + [
        word.removeprefix("--set=") for word in words if word.startswith("--set=")
    ]


def named_in(words):
    """The preset that a command names; of a table that of its rows; base for files, which pages make up."""
    match words[:3]:
        case ["lwfed", "table", name]:
            return load_table(name).config
        case ["lwfed", "simulate" | "cost" | "config" | "split", name] | ["edge-agent", "profile", name]:
            pass
        case _:
            name = words[words.index("--config") + 1] if "--config" in words else "base"
    return "base" if name.endswith(".yaml") or name.startswith("-") else name


def wrong_on_purpose():
    """Commands whose error follows in a block of its own: (words, error)."""
    shown = re.compile(r"^```sh\n([^\n]+)\n```\n\n```text\n(error: .*?)\n```$", re.MULTILINE | re.DOTALL)
    return [(shlex.split(command), text) for path in PAGES for command, text in shown.findall(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_block_is_of_a_kind_that_is_checked(path):
    text = path.read_text(encoding="utf-8")
    assert {found["language"] for found in FENCE.finditer(text)} <= LANGUAGES
    assert "```" not in FENCE.sub("", text)


@pytest.mark.parametrize("text", blocks("sh"))
def test_commands_in_blocks_exist_with_their_options(text):
    extras = set(re.findall(r"^(\w+) =$", page("setup.cfg").partition("[options.extras_require]")[2], re.MULTILINE))
    wrong = [words for words, _ in wrong_on_purpose()]
    for words in commands(text):
        program = Path(words[0]).name
        if program in PROGRAMS:
            check([program, *words[1:]])
            if words not in wrong:
                load_config(named_in([program, *words[1:]]), settings_of(words))
        else:
            assert program in SHELL
        assert {extra for word in words for extra in re.findall(r"\[(\w+)\]$", word)} <= extras


def test_recorded_commands_are_rows_of_our_tables():
    tables = map(load_table, (file.stem for file in (ROOT / "configs" / "tables").glob("*.yaml")))
    rows = [(table.config, table.data, row.dropout, (*table.set, *row.set)) for table in tables for row in table.rows]
    shown = [words for block in blocks("sh") for words in commands(block.values[0])]
    recorded = [words for words in shown if words[1:2] == ["simulate"] and "--seeds=" in str(words)]
    assert len(recorded) > 20
    for words in recorded:
        dropout = next((float(word.partition("=")[2]) for word in words if word.startswith("--dropout=")), 0.0)
        assert (words[2], words[words.index("--data") + 1], dropout, tuple(settings_of(words))) in rows


MAKE = [words for block in blocks("sh") for words in commands(block.values[0]) if words[0] == "make"]


@pytest.mark.parametrize("words", MAKE, ids=" ".join)
def test_make_has_the_target_and_takes_the_variables(words):
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.MULTILINE))
    variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    assert {word for word in words[1:] if "=" not in word} <= targets
    assert all(f"$({name})" in page("Makefile") or f"export {name}" in page("Makefile") for name in variables)
    check(["lwfed", "demo", *shlex.split(variables.get("DEMO_ARGS", ""))])


@pytest.mark.parametrize(("words", "shown"), wrong_on_purpose(), ids=lambda value: value[:20] if isinstance(value, str) else None)
def test_shown_errors_are_the_real_ones(words, shown):
    with pytest.raises(errors.ConfigError) as caught:
        load_config(words[words.index("--config") + 1], settings_of(words))
    assert f"error: {caught.value}" == shown


@pytest.mark.parametrize("words", list(inline_commands()))
def test_commands_in_running_text_exist(words):
    with contextlib.suppress(click.MissingParameter):  # running text leaves out what does not matter there
        check(words)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configurations_are_valid_and_state_differences_only(text, tmp_path):
    path = tmp_path / "garden.yaml"
    path.write_text(text)
    given = load_config(str(path)).model_dump(mode="json")
    base = load_config("base").model_dump(mode="json")
    for section, values in re.findall(r"^(\w+): \{(.*)\}$", text, re.MULTILINE):
        for key in re.findall(r"(\w+):", values):
            assert given[section][key] != base[section][key]


@pytest.mark.parametrize("text", blocks("python"))
def test_code_runs(text, tmp_path, monkeypatch, backbones):
    import_torchvision()  # which timm needs, in whatever condition
    monkeypatch.chdir(tmp_path)
    for name, preset, stage in (("encoder", "demo", 4), ("partial", "resnet18", 2)):
        if name in text:
            export_random(load_config(preset), stage, tmp_path / f"{name}.safetensors")
    exec(compile(text, "README.md", "exec"), {})


@pytest.fixture
def backbones():
    """Those an example adds are gone after it."""
    before = dict(CONVOLUTIONAL)
    yield
    CONVOLUTIONAL.clear()
    CONVOLUTIONAL.update(before)


def export_random(config, stage, out):
    random, parts = np.random.default_rng(0), config.plan(stage).present
    for part in parts:
        arrays = {name: random.random(shape, dtype=np.float32) for name, shape in part_shapes(config, part).items()}
        (out.parent / part).write_bytes(tensors.encode(arrays))
    export(config, stage, {part: part for part in parts}, lambda blob: out.parent / blob, out)


def links():
    for path in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                yield pytest.param((path.parent / target.partition("#")[0]).resolve(), id=f"{path.name}-{target}")


@pytest.mark.parametrize("target", list(links()))
def test_links_lead_somewhere(target):
    assert target.exists()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_named_files_exist(path):
    """Every path in backquotes that begins with a folder of ours; `{...}` and `<...>` are patterns."""
    names = re.findall(r"`((?:lwfed|models|edge_agent|cloud_server|tools|configs|tests|docs)/[\w./-]+)`", path.read_text(encoding="utf-8"))
    assert not [name for name in names if not (ROOT / name).exists() and not name.startswith("lwfed/<")]


def rows(name, header):
    """Cells of the table whose first header cell is `header`, without backquotes."""
    table = page(name).partition(f"| {header} |")[2].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in table]


def below(kind):
    yield kind
    for child in kind.__subclasses__():
        yield from below(child)


def test_the_table_of_exit_codes_is_the_tree_of_errors():
    listed = {name: int(code) for code, names, *_ in rows("docs/EXIT_CODES.md", "code") for name in names.split(", ") if name}
    assert listed == {kind.__name__: kind.exit_code for kind in below(errors.LwfedError) if kind.__module__ == errors.__name__}


def test_the_service_is_not_restarted_where_it_is_of_no_use():
    text = page("docs/EXIT_CODES.md")
    useless = {code for code, *_, again in rows("docs/EXIT_CODES.md", "code") if again == "no"}
    assert set(re.search(r"RestartPreventExitStatus=([\d ]+)", text)[1].split()) == useless
    assert useless == set(re.findall(r"\d+", re.search(r"restarted on ([^:]+):", errors.__doc__)[1]))


def test_the_table_of_presets_is_complete():
    assert sorted(row[0] for row in rows("docs/CONFIGURATION.md", "preset")) == presets()


def test_the_table_of_backbones_is_complete():
    listed = [(name, layers, width) for name, layers, width, *_ in rows("docs/BACKBONES.md", "backbone")]
    expected = [(name, str(traits.depth), str(traits.width)) for name, traits in CONVOLUTIONAL.items()]
    assert listed == [("vit", "model.depth", "model.width"), *expected]


def test_the_tables_of_the_protocol_are_complete():
    listed = {kind: name for kind, name, _ in rows("docs/PROTOCOL.md", "kind")}
    assert listed == {kind: model.__name__ for kind, model in (messages.UP | messages.DOWN).items()}
    fleet = topics.Topics("fleet")
    for topic, *_ in rows("docs/PROTOCOL.md", "topic"):
        plain = topic.replace("<fleet>", "fleet").replace("<index>", "0").replace("<kind>", "task")
        assert fleet.parse(re.sub("[<>]", "", plain)) is not None


def test_documented_variables_are_read():
    read = "".join(path.read_text() for path in (ROOT / "lwfed").rglob("*.py"))
    for name, *_ in rows("docs/CONFIGURATION.md", "variable"):
        assert f'"{name}"' in read


def test_the_folders_in_architecture_are_those_that_there_are():
    listed = {row[0].rstrip("/") for row in rows("ARCHITECTURE.md", "folder")}
    assert listed == {path.parent.name for path in ROOT.glob("*/__init__.py")} | {"tests"}
