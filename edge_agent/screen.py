"""What `join` shows: lines for events, and at a terminal a progress bar between them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from lwfed.console import Console
from lwfed.edge_agent.events import Show, Tell


class Screen:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._with_bar = bool(sys.stdout and sys.stdout.isatty()) and not console.as_json  # no stdout at all: it was closed
        self._bar: Any = None
        self._showing = ("", 0)

    def tell(self, line: Tell) -> None:
        self.end_bar()
        self._console.say(line.event, line.text, **line.fields)

    def show(self, progress: Show) -> None:
        if not self._with_bar or not progress.total:
            return
        with self._until_the_terminal_is_gone():
            self._draw(progress)

    def end_bar(self) -> None:
        bar, self._bar, self._showing = self._bar, None, ("", 0)
        with self._until_the_terminal_is_gone():
            if bar is not None:
                bar.__exit__(None, None, None)

    def _draw(self, progress: Show) -> None:
        if self._showing != (progress.what, progress.total):
            self.end_bar()
            self._showing = progress.what, progress.total
            self._bar = click.progressbar(length=progress.total, label=progress.what, width=30)
            self._bar.__enter__()
        self._bar.update(progress.done - self._bar.pos)
        if progress.done >= progress.total:
            self.end_bar()

    @contextmanager
    def _until_the_terminal_is_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._bar, self._with_bar = None, False
