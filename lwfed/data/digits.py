"""scikit-learn's 1,797 scanned digits, 8x8, read from its wheel without importing it (which costs 60 MB).

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lwfed.errors import MissingDependency

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

COUNT = 1797


def locate() -> Path:
    """The file in the installed scikit-learn; raises MissingDependency."""
    spec = find_spec("sklearn")
    for place in (spec.submodule_search_locations if spec else None) or ():
        file = Path(place, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            return file
    raise MissingDependency("the data set 'digits' comes with scikit-learn, which is not installed: pip install 'lwfed[demo]'")


def read() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images [1797, 8, 8] and their digits [1797]; raises MissingDependency."""
    import numpy as np

    table = np.loadtxt(locate(), delimiter=",")
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return images, table[:, -1].astype(np.int64)
