"""The pages of the documentation, their blocks, and the commands in them."""

import re
import shlex
from pathlib import Path

import click
import pytest

from lwfed.cloud_server.cli import main as cloud_server
from lwfed.edge_agent.cli import main as edge_agent
from lwfed.tools.cli import main as lwfed

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = {"edge-agent": edge_agent, "cloud-server": cloud_server, "lwfed": lwfed}
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


def page(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(language, pages=tuple(PAGES)):
    return [
        pytest.param(found["text"].replace("\n" + found["indent"], "\n").strip(), id=f"{path.name}-{number}")
        for path in pages
        for number, found in enumerate(FENCE.finditer(path.read_text(encoding="utf-8")))
        if found["language"] == language
    ]


def text_of(name, language):
    return [block.values[0] for block in blocks(language, (ROOT / name,))]


def commands(text):
    for line in text.splitlines():
        if line and not line.startswith("#"):
            yield shlex.split(line, comments=True)


def check(words):
    """Raises when the program has no such command or option. Nothing runs."""
    command, arguments, context = PROGRAMS[words[0]], words[1:], None
    while isinstance(command, click.Group) and not (command.invoke_without_command and all(word.startswith("-") for word in arguments)):
        context = click.Context(command, parent=context, info_name=words[0])
        _, command, arguments = command.resolve_command(context, arguments)
    return command.make_context(command.name, list(arguments), parent=context)
