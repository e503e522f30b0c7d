"""What a program tells the person who runs it: plain lines, or one JSON object a line for other programs."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from typing import Any

import click


class Console:
    """Goes on in silence where nobody can listen: a full disk of logs, or a terminal that is gone, must not end a service."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json

    def say(self, event: str, text: str, **fields: Any) -> None:
        """Report `event`: its `text` to a person, its `fields` (with ``event``, ``time``, ``text``) as JSON."""
        if self.as_json:
            line = json.dumps({"event": event, "time": round(time.time(), 3), "text": text, **fields})
        else:
            line = f"{time.strftime('%H:%M:%S')}  {printable(text)}"
        with contextlib.suppress(OSError):
            click.echo(line)


def counted(number: int, noun: str) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str) -> str:
    """One line of what the terminal can show: what a device says of itself must not forge lines, steer a terminal or fail there."""
    line = re.sub(r"\s*\n\s*", "; ", text.strip())
    shown = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # there may be no terminal at all
    return shown.encode(encoding, "backslashreplace").decode(encoding)
