"""What a person names with ``--data`` or in the configuration: a folder of images, or a data set known by name.

The cheap side of a source, for processes that only want to know whether there is something to train on;
`lwfed.data.load` reads the images.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lwfed.data import digits, scan, sets
from lwfed.errors import MissingDependency

NAMES = ("digits", *sets.NAMES)

Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True)
class Source:
    spec: str

    @property
    def named(self) -> bool:
        """Whether the data set is known by name, and therefore split among server and devices; a folder is used whole."""
        return self.spec in NAMES

    @property
    def label(self) -> str:
        """What others may know of it: the path of a folder is nobody's business."""
        return self.spec if self.named else "folder"

    @property
    def folder(self) -> Path:
        """Raises DataError."""
        return scan.locate(self.spec)

    def check(self) -> int | None:
        """How many images there seem to be, without decoding them; None where only reading the set can tell.

        Raises DataError when there can be nothing to train on, MissingDependency when a package is missing.
        """
        if self.spec == "digits":
            digits.locate()
            return digits.COUNT
        if self.named:
            if find_spec("torchvision") is None:
                raise MissingDependency(f"the data set {self.spec!r} needs torchvision, which is not installed: pip install 'lwfed[sets]'")
            sets.require(self.spec)
            return None
        files = scan.find(self.folder)
        scan.require_readable(self.folder, files)
        return len(files)


def open_source(spec: str) -> Source:
    """The source that `spec` names; ``./digits`` is a folder where ``digits`` is the data set. Raises DataError."""
    source = Source(spec)
    if not source.named:
        near = difflib.get_close_matches(spec, NAMES, 1)
        hint = f"did you mean the data set {near[0]!r}?" if near else f"give the path of a folder of images, or one of {', '.join(NAMES)}"
        scan.locate(spec, hint)
    return source
