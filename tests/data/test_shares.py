import hashlib

import numpy as np
import pytest

from lwfed.config import load_config
from lwfed.data.load import device_images
from lwfed.data.shares import split
from lwfed.errors import DataError

LABELS = np.repeat(np.arange(10), 60)


def section(**values):
    return load_config("demo").data.model_copy(update=values)


def everything(shares):
    return np.concatenate([shares.labelled, shares.auxiliary, *shares.devices])


@pytest.mark.parametrize("partition", ["even", "dirichlet"])
def test_every_image_is_in_exactly_one_share(partition):
    shares = split(LABELS, section(partition=partition, devices=5), 0)
    assert sorted(everything(shares)) == list(range(600))
    assert (len(shares.labelled), len(shares.auxiliary)) == (210, 90)


def test_the_labelled_share_has_the_same_part_of_every_class():
    assert np.bincount(LABELS[split(LABELS, section(), 0).labelled]).tolist() == [21] * 10


def test_a_set_with_a_test_split_gives_nothing_for_evaluation():
    shares = split(LABELS, section(), 0, has_test_split=True)
    assert len(shares.labelled) == 0
    assert len(everything(shares)) == 600


def test_even_shares_differ_by_one_at_most():
    sizes = [len(rows) for rows in split(LABELS, section(partition="even", devices=7), 0).devices]
    assert max(sizes) - min(sizes) <= 1


def test_a_small_beta_gives_each_device_few_classes_and_a_large_one_all():
    def classes(beta):
        shares = split(LABELS, section(partition="dirichlet", devices=5, dirichlet_beta=beta, min_images=2), 0)
        return np.mean([np.count_nonzero(np.bincount(LABELS[rows], minlength=10) >= 2) for rows in shares.devices])

    assert classes(0.1) < 5
    assert classes(100.0) == 10


def test_no_device_falls_below_the_minimum():
    for seed in range(10):
        shares = split(LABELS, section(devices=6, dirichlet_beta=0.2, min_images=20), seed)
        assert min(map(len, shares.devices)) >= 20


def test_an_impossible_split_says_which_setting_to_change():
    with pytest.raises(DataError, match=r"data\.devices 100"):
        split(LABELS, section(devices=100), 0)
    with pytest.raises(DataError, match="dirichlet_beta"):
        split(LABELS, section(devices=30, dirichlet_beta=0.01, min_images=9), 0)


def test_the_split_is_the_seeds_alone_and_the_same_on_every_machine():
    def digest(seed):
        return hashlib.sha256(everything(split(LABELS, section(), seed)).astype("<i8").tobytes()).hexdigest()[:16]

    assert digest(1) != digest(0)
    assert digest(0) == "29e718010c015c09"


def test_the_server_keeps_shares_only_of_a_set_that_it_uses():
    def devices_hold(*settings):
        config = load_config("demo", settings)
        return sum(len(device_images("digits", config, number)) for number in range(config.data.devices))

    assert devices_hold("calibration.every=never", "evaluation.data=null") == 1797
    without_calibration, whole = devices_hold("calibration.every=never"), devices_hold()
    assert 0.63 * 1797 < without_calibration < 0.67 * 1797
    assert 0.48 * 1797 < whole < 0.52 * 1797
