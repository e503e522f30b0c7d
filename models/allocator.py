"""Memory that is not needed at the moment, given back to the system: what one phase leaves behind would count in the peak of the next.

On Linux with glibc; elsewhere these do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

MADV_PAGEOUT = 21  # of Linux 5.4; Python's mmap does not name it


def give_back() -> None:
    """What has been freed, and lies between what has not."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another allocator, or system
        ctypes.CDLL(None).malloc_trim(0)


def page_out(maps: Path = Path("/proc/self/maps")) -> None:
    """Code and constants of libraries, which are on disk: torch's imports touch 80 MB of them, and training needs a fraction.

    What is needed again is read again.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        advise = ctypes.CDLL(None, use_errno=True).madvise
        for start, end in _read_only(maps.read_text()):
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_PAGEOUT)


def _read_only(maps: str) -> Iterator[tuple[int, int]]:
    """Ranges of addresses of files that nobody writes through."""
    for line in maps.splitlines():
        address, access, _, _, _, *file = line.split(maxsplit=5)
        if file and file[0].startswith("/") and "w" not in access:
            start, end = (int(part, 16) for part in address.split("-"))
            yield start, end
