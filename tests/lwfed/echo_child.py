"""A child for test_child.py: echoes, fails or dies as it is told."""

import os
import signal

print("a library greets while it is imported, without a newline", end="", flush=True)

from lwfed.child import serve  # noqa: E402
from lwfed.errors import DataError  # noqa: E402


def handle(data, say):
    match data:
        case {"do": "echo", "text": text}:
            print("noise of a library")
            say({"event": "echo", "text": text})
        case {"do": "fail"}:
            raise DataError("no images in /nowhere")
        case {"do": "exhaust"}:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        case {"do": "stumble"}:
            raise KeyError("nobody expected this")
        case {"do": "die in the middle of a line"}:
            os.write(int(os.environ["LWFED_CHILD_OUTPUT"]), b'{"event": "ec')
            os.kill(os.getpid(), signal.SIGKILL)
        case {"do": "die", "signal": name}:
            os.kill(os.getpid(), int(name) if name.isdecimal() else signal.Signals[name])


if __name__ == "__main__":
    serve(handle, {"event": "ready"})
