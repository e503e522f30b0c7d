"""A disk that loses at a power cut what was not synced, as much of it as the schedule's chance will have.

Files are real ones, in memory where the system has such a folder. Beside them is known what is certain to survive: of a file
the bytes that it had when it was synced, of a folder the names that it had then. At a power cut each name in a folder is as it
was at the last sync or as it is now, and so is the content of each file, or a mixture of both. Folders themselves stay.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

Names = dict[str, int]  # in a folder -> number of the file


class Disk:
    def __init__(self) -> None:
        self._contents: dict[int, bytes] = {}  # of files that were synced, by their number
        self._names: dict[Path, Names] = {}  # of folders that were synced

    def sync(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self._contents[os.fstat(file.fileno()).st_ino] = file.read()
        except IsADirectoryError:
            self._names[path] = _names(path)

    def lose_power(self, root: Path, random: Random) -> None:
        """What is below `root` becomes what its disk has at a power cut."""
        for folder in sorted(Path(name) for name, _, _ in os.walk(root)):
            self._lose(folder, random)

    def _lose(self, folder: Path, random: Random) -> None:
        now, synced = _names(folder), self._names.get(folder, {})
        present = {number: (folder / name).read_bytes() for name, number in now.items()}
        survived = {}
        for name in sorted(now.keys() | synced.keys()):
            number = _either(random, synced.get(name), now.get(name))
            if number is not None:
                before = self._contents.get(number, b"")
                survived[name] = _torn(random, before, present.get(number, before))
        for name in now:
            (folder / name).unlink()
        for name, content in survived.items():
            (folder / name).write_bytes(content)
            self.sync(folder / name)
        self.sync(folder)


def _either(random: Random, synced: int | None, now: int | None) -> int | None:
    return synced if synced == now else random.choice((synced, now))


def _torn(random: Random, before: bytes, now: bytes) -> bytes:
    """Of a file that had been synced as `before`: its end may be missing, or some bytes of it may not be there yet."""
    if before == now:
        return now
    match random.randrange(4):
        case 0:
            return before
        case 1:
            return now
        case 2:
            return now[: random.randrange(len(now) + 1)]
        case _:
            start = random.randrange(len(now) + 1)
            length = min(len(now) - start, 1024)
            old = before[start : start + length].ljust(length, b"\0")
            return now[:start] + old + now[start + length :]


def _names(folder: Path) -> Names:
    with os.scandir(folder) as entries:
        return {entry.name: entry.inode() for entry in entries if entry.is_file()}
