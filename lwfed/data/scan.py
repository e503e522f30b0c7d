"""Which image files a folder holds, in an order that every run repeats."""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lwfed.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})


def locate(spec: str, hint: str = "check the path") -> Path:
    """The folder that `spec` names. Raises DataError when it is none or cannot be reached; `hint` is for one that is not there."""
    folder, mode = _reach(spec, "folder", hint)
    if not stat.S_ISDIR(mode):
        raise DataError(f"{spec!r} is a file; give the folder that holds the images, or an .npz file")
    return folder


def locate_file(spec: str) -> Path:
    """The file that `spec` names. Raises DataError when it is none or cannot be reached."""
    file, mode = _reach(spec, "file", "check the path")
    if not stat.S_ISREG(mode):
        raise DataError(f"{spec!r} is no file; a folder of images needs a name that does not end in {Path(spec).suffix}")
    return file


def _reach(spec: str, kind: str, hint: str) -> tuple[Path, int]:
    """The path and its mode."""
    if not spec:
        raise DataError(f"the name of the images is empty; {hint}")
    try:
        path = Path(spec).expanduser()
        return path, path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # expanduser: a home of nobody
        raise DataError(f"there is no {kind} {spec!r}; {hint}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"the {kind} {spec!r} cannot be reached ({reason}); check the path and its permissions") from None


def find(folder: Path) -> list[Path]:
    """All image files below `folder`, by extension, sorted; hidden ones left out.

    Links are followed, each folder is visited once, so loops end. Raises DataError when there is none.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for parent, children, names in os.walk(folder, followlinks=True, onerror=_refuse_top(folder)):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            children.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        children[:] = sorted(name for name in children if not name.startswith("."))
        found += [Path(parent, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS]
    if not found:
        known = " ".join(sorted(extension[1:] for extension in EXTENSIONS))
        raise DataError(f"no images in {str(folder)!r}; put some there or below ({known})")
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _refuse_top(folder: Path) -> Callable[[OSError], None]:
    def refuse(error: OSError) -> None:
        if error.filename == str(folder):  # a sub-folder that may not be read is like one that is not there
            raise DataError(f"the folder {str(folder)!r} cannot be read ({error.strerror}); check its permissions") from None

    return refuse


def classes(folder: Path, files: list[Path]) -> tuple[str, ...]:
    """The class folders directly below `folder`, sorted; empty unless every image lies in one."""
    tops = {path.relative_to(folder).parts for path in files}
    if any(len(parts) < 2 for parts in tops):
        return ()
    return tuple(sorted({parts[0] for parts in tops}))


def class_numbers(folder: Path, files: list[Path], kinds: tuple[str, ...]) -> list[int]:
    """Which of `kinds`, as `classes` gave them, each file lies in."""
    numbers = {kind: number for number, kind in enumerate(kinds)}
    return [numbers[path.relative_to(folder).parts[0]] for path in files]


def open_image(path: Path) -> Image.Image:
    """Open without decoding the pixels. Raises whatever Pillow raises, and for decompression bombs too."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(path)


def require_readable(folder: Path, files: list[Path]) -> None:
    """Raise DataError unless at least one file begins like an image."""
    for path in files:
        try:
            with open_image(path):
                return
        except Exception:  # noqa: S112, Pillow's decoders raise nearly anything on broken files
            continue
    raise DataError(f"none of the {len(files)} image files in {str(folder)!r} can be read; the first is {files[0].name!r}: is it an image?")
