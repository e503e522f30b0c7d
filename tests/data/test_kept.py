from pathlib import Path

import numpy as np
import pytest

from lwfed.data import cache
from lwfed.data.images import Shape
from lwfed.edge_agent.resources import status_mb
from lwfed.errors import DataError

SHAPE = Shape(64, 3)
OWN = Path("/proc/self")


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (2000, 3, 64, 64), dtype=np.uint8)


@pytest.fixture
def kept(pixels, tmp_path):
    cache.store(tmp_path, "device", "key", len(pixels) + 3, SHAPE, enumerate(pixels))
    return cache.load(tmp_path, "device", "key")[0]


def test_it_reads_as_the_array_that_was_kept(kept, pixels):
    rows = np.array([7, 1999, 0, 7])
    assert (kept.shape, kept.dtype, len(kept)) == (pixels.shape, pixels.dtype, len(pixels))
    assert np.array_equal(kept[rows], pixels[rows])
    assert np.array_equal(kept[1990:2010], pixels[1990:])
    assert np.array_equal(np.asarray(kept), pixels)
    with pytest.raises(IndexError, match="no image 2000 among 2000"):
        kept[np.array([2000])]


def test_what_has_been_read_does_not_stay_in_memory(kept, pixels):
    before = status_mb(OWN, "RssFile")
    if before is None:
        pytest.skip("this system does not tell what of a process's memory is of files")
    for first in range(0, len(kept), 100):
        kept[first : first + 100]
    assert status_mb(OWN, "RssFile") < before + 0.2 * pixels.nbytes / 1e6


def test_a_file_that_is_cut_short_while_it_is_read_says_what_to_do(kept, tmp_path):
    with open(next(tmp_path.glob("*.npy")), "r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(DataError, match="cut short: start again"):
        kept[1999:]
