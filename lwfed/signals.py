"""What SIGINT and SIGTERM do."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def on_signals(call: Callable[[], object]) -> Iterator[None]:
    """SIGINT and SIGTERM `call` within the block, and do what they did before after it. For the main thread."""
    before = {number: signal.signal(number, lambda *_: call()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
