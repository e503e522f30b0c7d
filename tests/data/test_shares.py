import hashlib

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from lwfed.config import load_config
from lwfed.data import shares
from lwfed.data.load import device_images
from lwfed.errors import DataError

LABELS = np.repeat(np.arange(10), 60)
DEMO = load_config("demo").data
PARTITIONS = ("even", "dirichlet", "classes", "quantity", "folders")


def section(**values):
    return DEMO.model_copy(update=values)


def split(labels, data, seed=0, has_test_split=False):
    return shares.split(len(labels), labels, data, seed, has_test_split=has_test_split)


def everything(found):
    return np.concatenate([found.labelled, found.auxiliary, *found.devices])


@st.composite
def cases(draw):
    """Labels [N], a way to split them, and a seed."""
    labels = np.array(draw(st.lists(st.integers(0, 6), min_size=1, max_size=80)))
    data = section(
        partition=draw(st.sampled_from(PARTITIONS)),
        devices=draw(st.integers(1, 12)),
        dirichlet_beta=draw(st.sampled_from([1e-4, 0.1, 1.0, 100.0])),
        quantity_beta=draw(st.sampled_from([1e-4, 0.1, 1.0, 100.0])),
        classes_per_device=draw(st.integers(1, 7)),
        auxiliary_share=draw(st.sampled_from([0.0, 0.2])),
        labelled_share=draw(st.sampled_from([0.0, 0.3])),
        min_images=2,
    )
    return labels, data, draw(st.integers(0, 2**63 - 1))


@given(cases())
def test_every_image_is_in_exactly_one_share_and_shares_are_sorted(case):
    labels, data, seed = case
    try:
        found = split(labels, data, seed)
    except DataError:
        reject()  # classes that cannot be dealt, or too few images for anybody
    assert sorted(everything(found)) == list(range(len(labels)))
    assert len(found.devices) == data.devices
    assert all((np.diff(rows) > 0).all() for rows in (found.labelled, found.auxiliary, *found.devices))


def test_the_server_gets_its_part_first():
    found = split(LABELS, section())
    assert (len(found.labelled), len(found.auxiliary)) == (210, 90)


def test_the_labelled_share_has_the_same_part_of_every_class():
    assert np.bincount(LABELS[split(LABELS, section()).labelled]).tolist() == [21] * 10


def test_a_set_with_a_test_split_gives_nothing_for_evaluation():
    found = split(LABELS, section(), has_test_split=True)
    assert len(found.labelled) == 0
    assert len(everything(found)) == 600


@pytest.mark.parametrize("partition", ["even", "quantity"])
def test_images_without_labels_are_split_too(partition):
    found = shares.split(600, None, section(partition=partition), 0, has_test_split=False)
    assert len(found.labelled) == 0
    assert sorted(everything(found)) == list(range(600))


def test_a_device_with_too_few_images_is_no_trouble_for_the_others():
    found = split(LABELS, section(partition="dirichlet", dirichlet_beta=0.01, devices=30))
    sizes = list(map(len, found.devices))
    assert min(sizes) < DEMO.min_images <= max(sizes)


def test_shares_that_are_all_too_small_say_which_setting_to_change():
    with pytest.raises(DataError, match=r"data\.devices 100: no share has data\.min_images 8"):
        split(LABELS, section(partition="even", devices=100))


def test_the_split_is_the_seeds_alone_and_the_same_on_every_machine():
    def digest(seed, **values):
        return hashlib.sha256(everything(split(LABELS, section(**values), seed)).astype("<i8").tobytes()).hexdigest()[:16]

    assert digest(1) != digest(0)
    assert digest(0) == "29e718010c015c09"
    assert {one: digest(0, partition=one, devices=5) for one in PARTITIONS} == {
        "even": "2dafb8844d8d16b9",
        "dirichlet": "d17f13553c9875ca",
        "classes": "4305beb3d1645757",
        "quantity": "7a963b13bd4d2879",
        "folders": "30e4a88a99515d64",
    }


def test_the_server_keeps_shares_only_of_a_set_that_it_names():
    def devices_hold(*settings):
        config = load_config("demo", settings)
        return sum(len(device_images("digits", config, number)) for number in range(config.data.devices))

    unnamed = ("calibration.every=never", "calibration.data=null")
    assert devices_hold(*unnamed, "evaluation.data=null") == 1797
    without_calibration, whole = devices_hold(*unnamed), devices_hold()
    assert devices_hold("calibration.every=never") == whole  # the same split, whether it calibrates or not
    assert 0.63 * 1797 < without_calibration < 0.67 * 1797
    assert 0.48 * 1797 < whole < 0.52 * 1797
    assert devices_hold("calibration.data=fashion-mnist", "evaluation.data=fashion-mnist") == 1797
