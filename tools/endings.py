"""How a person or the system ends a demo: by a signal, with 128 + its number as exit code, and with everything cleared up."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

ENDINGS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def on_endings(call: Callable[[int], object]) -> Iterator[None]:
    """Within the block such a signal calls `call` with its number. Those that are ignored, as under nohup, stay so.

    For the main thread.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        call(number)

    before = {number: signal.signal(number, handle) for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:  # which it is not while we leave
                signal.signal(number, handler)


def leave(number: int) -> NoReturn:
    """End this process, from now on undisturbed by further signals."""
    for one in ENDINGS:
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)
