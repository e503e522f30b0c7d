import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lwfed.cloud_server.aggregate import SUMS, l_dawa, mean
from lwfed.cloud_server.sampling import sample
from lwfed.cloud_server.updates import Share

from .merging import RULES, merge_parts, settings_of


def test_the_mean_is_weighted_by_images(write, merge):
    shares = [Share(0, 1, write(0, w=[0.0, 4.0])), Share(1, 3, write(1, w=[4.0, 0.0]))]
    assert merge("mean", shares).tolist() == [3.0, 1.0]


def test_l_dawa_weighs_by_images_and_by_the_angle_to_the_previous_model(write, merge):
    """A device along the old direction counts whole, one at 60 degrees half, one across not at all, one against it turned."""
    before = [2.0, 0.0]
    updates = {0: [3.0, 0.0], 1: [1.0, 3**0.5], 2: [0.0, 7.0], 3: [-2.0, 0.0]}
    shares = [Share(number, 1 + number, write(number, w=w)) for number, w in updates.items()]
    expected = (1 * np.array([3.0, 0.0]) + 2 * 0.5 * np.array([1.0, 3**0.5]) + 4 * np.array([2.0, 0.0])) / 10
    assert np.allclose(merge("l_dawa", shares, before), expected, rtol=1e-6)


finite = st.floats(-1e3, 1e3, width=32)
updates = st.integers(1, 6).flatmap(
    lambda size: st.tuples(
        arrays(np.float32, size, elements=finite),
        st.lists(st.tuples(st.integers(1, 1000), arrays(np.float32, size, elements=finite)), min_size=1, max_size=5),
    )
)


@settings(deadline=None)
@given(updates)
def test_l_dawa_is_its_formula(drawn):
    before, found = drawn
    total = sum(images for images, _ in found)
    expected = np.zeros(len(before))
    for images, tensor in found:
        one, other = tensor.astype(float), before.astype(float)
        norms = np.linalg.norm(one) * np.linalg.norm(other)
        expected += images / total * (one @ other / norms if norms else 1.0) * one
    assert np.allclose(l_dawa(before, [(images / total, tensor) for images, tensor in found]), expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None)
@given(updates)
def test_l_dawa_of_devices_that_kept_their_direction_is_the_mean(drawn):
    before, found = drawn
    total = sum(images for images, _ in found)
    weighted = [(images / total, before * np.float32(2 ** (images % 3))) for images, _ in found]
    assert np.allclose(l_dawa(before, weighted), mean(before, weighted), rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_arrival_does_not_change_a_bit(write, merge, rule, seed):
    random = np.random.default_rng(seed)
    shares = [Share(number, int(random.integers(1, 999)), write(number, w=random.normal(size=300) * 10.0**number)) for number in range(5)]
    before = random.normal(size=300)
    orders = list(itertools.permutations(shares))[::7]
    assert len({merge(rule, order, before, clip_norm="median").tobytes() for order in orders}) == 1
    cancelling = [Share(number, 1, write(f"c{number}", w=[value])) for number, value in enumerate((1e30, -1e30, 1.0))]
    assert len({merge(rule, order, [1.0]).tobytes() for order in itertools.permutations(cancelling)}) == 1


def test_running_statistics_are_averaged_by_images_under_rules_that_weigh(write):
    names = ("layer1.0.bn1.running_mean", "layer1.0.bn1.running_var")
    shares = [Share(0, 1, write(0, **dict.fromkeys(names, (0.0, 4.0)))), Share(1, 3, write(1, **dict.fromkeys(names, (4.0, 0.0))))]
    previous = {"layer.1": write("before", **dict.fromkeys(names, (1.0, 0.0)))}
    for rule in SUMS:
        assert [value.tolist() for value in merge_parts(settings_of(rule), previous, shares)["layer.1"].values()] == [[3.0, 1.0]] * 2


def test_a_single_update_is_its_own_mean_to_the_bit(write, merge):
    value = np.array([1 / 3, -0.0, 1e-45, 3e38], np.float32)
    assert merge("mean", [Share(5, 7, write(0, w=value))]).tobytes() == value.tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_extremes_stay_finite(write, merge, rule):
    shares = [Share(number, 2**53 - 1, write(number, w=[3.4e38])) for number in range(3)]
    assert merge(rule, shares).tolist() == [np.float32(3.4e38)]


def test_nothing_to_aggregate_is_an_error(merge):
    with pytest.raises(ValueError, match="nothing to aggregate"):
        merge("mean", [])


def test_parts_hold_their_own_tensors(write):
    previous = {part: write(part, **{f"{part}.a": [1.0], f"{part}.b": [[1.0]]}) for part in ("norm", "projector")}
    update = write(0, **{f"{part}.{name}": value for part in previous for name, value in (("a", [2.0]), ("b", [[3.0]]))})
    found = merge_parts(settings_of("mean"), previous, [Share(0, 1, update)])
    assert {part: {name: value.tolist() for name, value in held.items()} for part, held in found.items()} == {
        part: {f"{part}.a": [2.0], f"{part}.b": [[3.0]]} for part in previous
    }


@given(there=st.sets(st.integers(0, 50), max_size=20), count=st.integers(1, 10), other=st.integers(51, 60))
def test_a_sample_is_stable_and_within_who_is_there(there, count, other):
    chosen = sample(3, 1, 2, there, count)
    assert len(chosen) == min(count, len(there))
    assert set(chosen) <= there
    assert chosen == sample(3, 1, 2, sorted(there, reverse=True), count)
    assert set(sample(3, 1, 2, there | {other}, count)) - {other} <= set(chosen)


def test_samples_of_rounds_differ():
    assert len({sample(0, 1, round, range(10), 3) for round in range(20)}) > 10
