"""Memory that is not needed at the moment, given back to the system: what one phase leaves behind would count in the peak of the next.

On Linux, with glibc; elsewhere these do nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MADV_DONTNEED = 4  # Python's mmap names it, and cannot apply it to what others have mapped
PROBES = 16
SMALL = 128 * 1024  # bytes that one of them brings at most, where the cache holds a file in pages: Linux maps 64 kB around it


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
        for mapping in _mappings(smaps):
            if mapping.as_in_file:
                advise(ctypes.c_void_p(mapping.start), ctypes.c_size_t(mapping.size), MADV_DONTNEED)


def read_code_in_pages(smaps: Path = Path("/proc/self/smaps")) -> None:
    """Have the system's cache drop the libraries of this process where it holds them in large pieces.

    Such as were written in one go, when they were installed: whoever needs a page of a piece has all of it mapped, which makes
    three to four times as much. What is needed is read from the disk again, by the page. What another process has mapped stays as it is.
    """
    let_code_go(smaps)
    with contextlib.suppress(AttributeError, OSError, TypeError):
        code = [mapping for mapping in _mappings(smaps) if mapping.as_in_file and mapping.access.startswith("r-x")]
        largest = max(code, key=lambda mapping: mapping.size, default=None)
        if largest is not None and _probed(largest, smaps) > PROBES * SMALL:
            let_code_go(smaps)
            for file in {mapping.file for mapping in code}:
                _drop(file)


def _probed(mapping: _Mapping, smaps: Path) -> int:
    """Bytes that a look at some of its pages brings."""
    for number in range(PROBES):
        ctypes.string_at(mapping.start + number * (mapping.size // PROBES), 1)
    return next((found.resident - mapping.resident for found in _mappings(smaps) if found.start == mapping.start), 0)


def _drop(file: str) -> None:
    with contextlib.suppress(OSError):  # one that has been replaced since, or that may not be read
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)  # for only what the disk has as well is dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


@dataclass
class _Mapping:
    start: int
    size: int
    access: str
    file: str
    resident: int = 0
    changed: int = 0  # bytes that are not as in the file

    @property
    def as_in_file(self) -> bool:
        """And nobody may write to it. Tables that the loader has filled in before it made them read-only are private memory: dropped,
        they would be lost.
        """
        return self.file.startswith("/") and "w" not in self.access and not self.changed


def _mappings(smaps: Path) -> Iterator[_Mapping]:
    found: _Mapping | None = None
    for line in smaps.read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first:
            if found:
                yield found
            access, _, _, _, *file = rest.split(maxsplit=4)
            start, end = (int(part, 16) for part in first.split("-"))
            found = _Mapping(start, end - start, access, file[0] if file else "")
        elif found and first == "Rss:":
            found.resident = 1024 * int(rest.split()[0])
        elif found and first == "Anonymous:":
            found.changed = 1024 * int(rest.split()[0])
    if found:
        yield found
