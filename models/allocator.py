"""Memory that is not needed at the moment, given back to the system: what one phase leaves behind would count in the peak of the next.

On Linux, with glibc; elsewhere these do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

MADV_DONTNEED = 4  # Python's mmap names it, and cannot apply it to what others have mapped


def give_back() -> None:
    """What has been freed, and lies between what has not."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another allocator, or system
        ctypes.CDLL(None).malloc_trim(0)


def let_code_go(smaps: Path = Path("/proc/self/smaps")) -> None:
    """Code and constants of libraries, of which torch's imports touch 80 MB and training needs a fraction.

    They stay in the system's cache of files, from where what is needed again is mapped again.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        advise = ctypes.CDLL(None).madvise
        for start, end in _untouched(smaps.read_text()):
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def _untouched(smaps: str) -> Iterator[tuple[int, int]]:
    """Ranges of addresses that are as in their files, and that nobody may write to.

    Tables that the loader has filled in before it made them read-only are private memory: dropped, they would be lost.
    """
    start = end = 0
    for line in smaps.splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            access, _, _, _, *file = rest.split(maxsplit=4)
            start, end = (int(part, 16) for part in first.split("-")) if file and file[0].startswith("/") and "w" not in access else (0, 0)
        elif first == "Anonymous:" and end and int(rest.split()[0]) == 0:
            yield start, end
