import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lwfed.data import partitions
from lwfed.errors import DataError

LABELS = np.repeat(np.arange(10), 60)
ROWS = np.random.RandomState(0).permutation(600)
seeds = st.integers(0, 2**32 - 1)


def counts(parts, labels=LABELS):
    """Images [devices, classes]."""
    return np.array([np.bincount(labels[part], minlength=labels.max() + 1) for part in parts])


def draws(partition, *arguments, count=200):
    return [partition(*arguments, partitions.stream(seed, "test")) for seed in range(count)]


def test_even_shares_differ_by_one_at_most():
    sizes = list(map(len, partitions.even(ROWS, 7)))
    assert max(sizes) - min(sizes) == 1


def test_a_small_beta_gives_each_device_few_classes_and_a_large_one_all():
    def held(beta):
        return (counts(partitions.dirichlet(ROWS, LABELS, 5, beta, partitions.stream(0))) >= 2).sum(axis=1)

    assert held(0.1).mean() < 5
    assert (held(1000.0) == 10).all()


def test_dirichlet_gives_the_part_of_a_class_its_mean_and_variance():
    beta, devices = 0.5, 4
    found = np.array([counts(parts) for parts in draws(partitions.dirichlet, ROWS, LABELS, devices, beta)]) / 60
    assert np.allclose(found.mean(axis=(0, 2)), 1 / devices, atol=0.03)
    variance = (1 / devices) * (1 - 1 / devices) / (devices * beta + 1)  # of a component of Dir(beta, ..., beta)
    assert np.allclose(found.var(axis=(0, 2)), variance, rtol=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_a_beta_that_rounds_every_draw_to_zero_gives_each_class_to_one_device(seed):
    found = counts(partitions.dirichlet(ROWS, LABELS, 2, 1e-6, partitions.stream(seed)))
    assert sorted(set(found.ravel().tolist())) == [0, 60]


@given(st.integers(1, 20), st.integers(0, 40), st.sampled_from([1e-6, 0.1, 10.0]), seeds)
def test_quantity_leaves_nobody_with_less_than_the_least_where_there_is_enough(devices, least, beta, seed):
    sizes = list(map(len, partitions.quantity(ROWS, devices, beta, least, partitions.stream(seed))))
    assert sum(sizes) == 600
    assert min(sizes) >= least or devices * least > 600


def test_quantity_has_the_skew_of_its_beta_and_no_favourite():
    def sizes(beta):
        return np.array([list(map(len, parts)) for parts in draws(partitions.quantity, ROWS, 4, beta, 8)])

    assert np.allclose(sizes(0.5).mean(axis=0), 150, atol=25)
    assert sizes(0.1).std() > 2 * sizes(2.0).std() > 4 * sizes(100.0).std()


def test_where_there_is_not_enough_for_all_some_still_get_enough():
    assert max(map(len, partitions.quantity(ROWS[:60], 10, 0.5, 8, partitions.stream(0)))) >= 8


@given(st.integers(1, 25), st.integers(1, 10), seeds)
def test_each_device_gets_its_number_of_classes_and_every_class_is_dealt(devices, each, seed):
    assume(devices * each >= 10)
    found = counts(partitions.classes(ROWS, LABELS, devices, each, partitions.stream(seed))) > 0
    assert (found.sum(axis=1) == each).all()
    holders = found.sum(axis=0)
    assert holders.min() >= 1
    assert holders.max() - holders.min() <= 1


def test_the_images_of_a_class_are_dealt_evenly_among_those_who_have_it():
    for parts in draws(partitions.classes, ROWS, LABELS, 7, 3, count=20):
        for column in counts(parts).T:
            assert np.ptp(column[column > 0]) <= 1


def test_who_gets_which_classes_is_drawn():
    hands = [counts(parts) > 0 for parts in draws(partitions.classes, ROWS, LABELS, 10, 2)]
    assert np.allclose(np.mean(hands, axis=0), 0.2, atol=0.12)
    assert len({tuple(map(tuple, hand)) for hand in hands}) == len(hands)


@pytest.mark.parametrize(("devices", "each"), [(4, 2), (3, 11)])
def test_classes_that_cannot_be_dealt_say_which_numbers_can(devices, each):
    with pytest.raises(DataError, match=f"between {-(-10 // devices)} and 10"):
        partitions.classes(ROWS, LABELS, devices, each, partitions.stream(0))


def test_folders_are_dealt_whole_and_in_turn():
    parts = partitions.folders(ROWS, LABELS, 4)
    assert [sorted(set(LABELS[part])) for part in parts] == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
    assert counts(parts).sum(axis=0).tolist() == [60] * 10


def test_more_devices_than_folders_leaves_some_without_images():
    assert list(map(len, partitions.folders(ROWS, LABELS, 12)))[-3:] == [60, 0, 0]
