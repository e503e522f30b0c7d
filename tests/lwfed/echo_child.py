"""A child for test_child.py: echoes, fails or dies as it is told."""

import os
import signal

from lwfed.child import serve
from lwfed.errors import DataError


def handle(data, say):
    match data:
        case {"do": "echo", "text": text}:
            print("noise of a library")
            say({"event": "echo", "text": text})
        case {"do": "fail"}:
            raise DataError("no images in /nowhere")
        case {"do": "exhaust"}:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        case {"do": "die", "signal": name}:
            os.kill(os.getpid(), signal.Signals[name])


if __name__ == "__main__":
    serve(handle, {"event": "ready"})
