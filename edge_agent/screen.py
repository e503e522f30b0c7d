"""What `join` shows: lines for events, and at a terminal a progress bar between them."""

from __future__ import annotations

import sys
from typing import Any

import click

from lwfed.console import Console
from lwfed.edge_agent.events import Show, Tell


class Screen:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._with_bar = sys.stdout.isatty() and not console.as_json
        self._bar: Any = None
        self._showing = ("", 0)

    def tell(self, line: Tell) -> None:
        self.end_bar()
        self._console.say(line.event, line.text, **line.fields)

    def show(self, progress: Show) -> None:
        if not self._with_bar or not progress.total:
            return
        if self._showing != (progress.what, progress.total):
            self.end_bar()
            self._showing = progress.what, progress.total
            self._bar = click.progressbar(length=progress.total, label=progress.what, width=30)
            self._bar.__enter__()
        self._bar.update(progress.done - self._bar.pos)
        if progress.done >= progress.total:
            self.end_bar()

    def end_bar(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
        self._showing = "", 0
