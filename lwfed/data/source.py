"""What a person names with ``--data`` or in the configuration: a folder of images, an .npz file, or a data set known by name.

The cheap side of a source, for processes that only want to know whether there is something to train on;
`lwfed.data.load` reads the images.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from lwfed.data import digits, downloads, scan
from lwfed.data.archive import Archive, open_archive
from lwfed.errors import DataError, MissingDependency

NAMES = ("digits", *downloads.NAMES)
ARCHIVE = ".npz"

Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True)
class Source:
    spec: str

    @property
    def named(self) -> bool:
        """Whether it is a data set known by name."""
        return self.spec in NAMES

    @property
    def archived(self) -> bool:
        """Whether it is an .npz file."""
        return self.spec.lower().endswith(ARCHIVE)

    @property
    def divided(self) -> bool:
        """Whether it is split among server and devices; a folder is used whole."""
        return self.named or self.archived

    @property
    def label(self) -> str:
        """What others may know of it: a path is nobody's business."""
        return self.spec if self.named else ARCHIVE[1:] if self.archived else "folder"

    @property
    def path(self) -> str:
        """`spec` for processes that work in another folder. Raises DataError."""
        if self.named:
            return self.spec
        return str((scan.locate_file(self.spec) if self.archived else self.folder).absolute())

    @property
    def folder(self) -> Path:
        """Raises DataError."""
        return scan.locate(self.spec)

    @property
    def archive(self) -> Archive:
        """Raises DataError."""
        return open_archive(scan.locate_file(self.spec))

    def same_set(self, spec: str | None) -> bool:
        """Whether `spec`, on whatever machine, names the same divided set; .npz files are told apart by their file names."""
        if spec is None or not self.divided:
            return False
        return Source(spec).archived and Path(spec).name == Path(self.spec).name if self.archived else spec == self.spec

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
            downloads.require(self.spec)
            return None
        if self.archived:
            return self.archive.train.count
        files = scan.find(self.folder)
        scan.require_readable(self.folder, files)
        return len(files)

    def check_labels(self) -> None:
        """Raise DataError when there is no class to evaluate by; as cheap as `check`."""
        if self.archived:
            archive = self.archive
            if archive.test is None and archive.train.unlabelled:
                raise DataError(f"{self.spec!r} has no classes to evaluate by: {archive.train.unlabelled}")
        elif not self.named and len(scan.classes(self.folder, scan.find(self.folder))) < 2:
            raise DataError(f"{self.spec!r} has no classes: put the images of each, two at least, into a sub-folder")


def open_source(spec: str) -> Source:
    """The source that `spec` names; ``./digits`` is a folder where ``digits`` is the data set. Raises DataError."""
    source = Source(spec)
    if source.archived:
        scan.locate_file(spec)
    elif not source.named:
        near = difflib.get_close_matches(spec, NAMES, 1)
        others = f"give the path of a folder of images or of an .npz file, or one of {', '.join(NAMES)}"
        scan.locate(spec, f"did you mean the data set {near[0]!r}?" if near else others)
    return source
