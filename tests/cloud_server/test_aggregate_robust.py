"""Aggregation against poisoned updates: what each rule computes, and what a minority can do to it."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from lwfed.cloud_server import updates
from lwfed.cloud_server.aggregate import median, trimmed_mean
from lwfed.cloud_server.krum import select
from lwfed.cloud_server.updates import Share, cut

from .merging import ROBUST, RULES, merge_parts, screened, settings_of

MANY = 10**15  # images, as one who poisons may say


@pytest.fixture
def line(write):
    """Updates of one number each, every device with more images than those before it together."""
    return lambda *values: [Share(number, 1000**number, write(number, w=[value])) for number, value in enumerate(values)]


@pytest.mark.parametrize(
    ("rule", "values", "expected", "more"),
    [
        ("median", (5, 1, 100), 5, {}),
        ("median", (4, 1, 100, 2), 3, {}),
        ("median", (7,), 7, {}),
        ("trimmed_mean", (6, 1, 0, 2, 100), 3, {"trim": 0.2}),
        ("trimmed_mean", (6, 1, 0, 100), 3.5, {"trim": 0.2}),  # one of four: rounded up
        ("trimmed_mean", (6, 1, 100), 6, {"trim": 0.4}),
        ("trimmed_mean", (6, 2), 4, {"trim": 0.4}),
        ("krum", (0, 1, 3, 7, 50), 1, {"byzantine": 1}),  # scores 1 + 9, 1 + 4, 4 + 9, 16 + 36, ...
        ("multi_krum", (0, 1, 3, 7, 50), 0.5, {"byzantine": 1}),  # the best two of five
        ("krum", (50, 1, 3, 0, 60, 7, 4), 1, {"byzantine": 2}),  # scores 1 + 4 + 9 of 1 and of 3: the first of equals
        ("krum", (8, 1, 3, 100), 5.5, {"byzantine": 1}),  # fewer than five: the median
        ("multi_krum", (8, 1, 100), 8, {"byzantine": 1}),
        ("krum", (8, 100), 1, {"byzantine": 1}),  # no majority: as received
    ],
)
def test_rules_by_hand(merge, line, rule, values, expected, more):
    assert merge(rule, line(*values), **more).tolist() == [expected]


def test_a_trimmed_part_that_is_whole_is_not_rounded_up():
    """0.28 * 25 is a little more than 7 in floating point."""
    stack = np.array([[-1000.0]] * 7 + [[-10.0]] + [[1.0]] * 9 + [[12.0]] + [[1000.0]] * 7, np.float32)
    assert trimmed_mean(stack, 0.28).tolist() == [1.0]
    stack[7] = -21
    assert trimmed_mean(stack, 0.28).tolist() == [0.0]


def test_clipping_bounds_the_norm_of_the_whole_update(write):
    """Deltas (3, 4) and 12 in different parts have a norm of 13."""
    received = {part: write(part, **{part: values}) for part, values in (("a", [1.0, 1.0]), ("b", [[2.0]]))}
    share = Share(3, 1, write(3, a=[4.0, 5.0], b=[[14.0]]))
    found = merge_parts(settings_of("mean", clip_norm=6.5), received, [share])
    assert found["a"]["a"].tolist() == [2.5, 3.0]
    assert found["b"]["b"].tolist() == [[8.0]]
    assert screened(settings_of("mean", clip_norm=6.5), received, [share]).clipped == {3: 0.5}
    untouched = merge_parts(settings_of("mean", clip_norm=13), received, [share])
    assert untouched["a"]["a"].tolist() == [4.0, 5.0]


@pytest.mark.parametrize(
    ("values", "clipped"),
    [((2, 3, 11), {2: 0.2}), ((2, 11), {1: 0.1}), ((1, 1, 5), {2: 0.0}), ((1, 1), {}), ((7,), {})],
)
def test_clipping_to_the_median_of_norms(write, line, values, clipped):
    """All had received 1. Of two norms the lesser counts; where most changed nothing, nobody does."""
    assert screened(settings_of("mean", clip_norm="median"), {"stem": write("before", w=[1.0])}, line(*values)).clipped == clipped


@pytest.mark.parametrize(
    ("rule", "expected"), [("mean", 1), ("l_dawa", 1), ("median", 2), ("trimmed_mean", 5 / 3), ("krum", 2), ("multi_krum", 2)]
)
def test_every_rule_combines_what_was_clipped(merge, write, rule, expected):
    shares = [Share(number, 1, write(number, w=[value])) for number, value in enumerate((1, 2, 3, 4, -100))]
    assert merge(rule, shares, [0.0], clip_norm=2).tolist() == [np.float32(expected)]


def test_who_is_left_out_is_said(write, line):
    received = {"stem": write("before", w=[0.0])}
    assert screened(settings_of("krum"), received, line(0, 1, 3, 7, 50)).left_out == (0, 2, 3, 4)
    assert screened(settings_of("multi_krum"), received, line(0, 1, 3, 7, 50)).left_out == (2, 3, 4)
    few = screened(settings_of("krum"), received, line(0, 1, 50))
    assert (few.left_out, few.fallback) == ((), "median")
    none = screened(settings_of("krum"), received, line(0, 50))
    assert (none.shares, none.left_out, none.fallback) == ((), (0, 1), "received")


def test_krum_compares_whole_updates(write):
    """Near all others in one part, far from them in the other."""
    received = {part: write(part, **{part: [0.0]}) for part in ("a", "b")}
    values = [(1, 9), (2, 1), (1, -9), (1, 1), (3, 1)]
    shares = [Share(number, 1, write(number, a=[a], b=[b])) for number, (a, b) in enumerate(values)]
    assert [share.participant for share in screened(settings_of("krum"), received, shares).shares] == [1]
    assert [share.participant for share in screened(settings_of("multi_krum"), received, shares).shares] == [1, 3]


@pytest.mark.parametrize("rule", ROBUST)
def test_running_statistics_are_no_way_around_a_robust_rule(write, rule):
    names = ("layer1.0.bn1.running_mean", "layer1.0.bn1.running_var")
    values = (1.0, 1.1, 1.2, 1.3, 1e6)
    shares = [Share(number, MANY, write(number, **dict.fromkeys(names, (value,)))) for number, value in enumerate(values)]
    merged = merge_parts(settings_of(rule), {"layer.1": write("before", **dict.fromkeys(names, (1.0,)))}, shares)["layer.1"]
    assert all(1.0 <= merged[name][0] <= 1.3 for name in names)


ATTACKS = {
    "sign-flipped x100": lambda honest, random: -100 * honest.mean(axis=0),
    "random noise": lambda honest, random: random.normal(size=honest.shape[1]) * 100,
    "all equal": lambda honest, random: np.full(honest.shape[1], 50.0),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("seed", range(3))
def test_a_minority_that_poisons_steers_the_mean_and_no_robust_rule(write, merge, attack, seed):
    """3 of 11 devices; what honest ones changed lies around a common direction. Bound: the honest update farthest from their mean."""
    random = np.random.default_rng(seed)
    before = random.normal(size=400).astype(np.float32)
    honest = random.normal(size=400) + random.normal(size=(8, 400)) * 0.5
    poisoned = [ATTACKS[attack](honest, random) for _ in range(3)]
    order = random.permutation(11)
    shares = [Share(int(number), 10, write(number, w=before + delta)) for number, delta in zip(order, [*honest, *poisoned], strict=True)]
    wanted, radius = honest.mean(axis=0), max(np.linalg.norm(honest - honest.mean(axis=0), axis=1))

    def error(rule, **more):
        return np.linalg.norm(merge(rule, shares, before, **more) - before - wanted)

    assert error("mean") > 15 * radius
    for rule, more in (("median", {}), ("trimmed_mean", {"trim": 0.3}), ("krum", {"byzantine": 3}), ("multi_krum", {"byzantine": 3})):
        assert error(rule, **more) <= radius * (1 + 1e-5), rule
        assert error(rule, clip_norm="median", **more) <= radius * (1 + 1e-5), rule
    # The poisoned 3/11 of the mean are no longer than an honest change: at worst they are opposite to it.
    longest = max(np.linalg.norm(honest, axis=1))
    assert error("mean", clip_norm="median") <= 3 / 11 * 2 * longest + radius


def test_a_claim_of_many_images_does_not_weigh(write, merge):
    shares = [Share(number, 1, write(number, w=[1.0 + number / 10])) for number in range(4)] + [Share(4, MANY, write(4, w=[1e6]))]
    assert merge("mean", shares)[0] > 9e5
    for rule in ROBUST:
        assert 1 <= merge(rule, shares)[0] <= 1.3


GREATEST = float(np.finfo(np.float32).max)
light = settings(deadline=None, max_examples=50)
numbers = st.floats(-GREATEST, GREATEST, width=32)


@st.composite
def majorities(draw):
    """(honest updates, fewer poisoned ones) of any numbers."""
    size, honest = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rows = st.integers(0, honest - 1).flatmap(lambda count: arrays(np.float32, (count, size), elements=numbers))
    return draw(arrays(np.float32, (honest, size), elements=numbers)), draw(rows)


@light
@given(majorities(), st.randoms(use_true_random=False))
def test_the_median_is_within_the_range_of_an_honest_majority(drawn, random):
    honest, poisoned = drawn
    rows = [*honest, *poisoned]
    random.shuffle(rows)
    found = median(np.stack(rows))
    assert (honest.min(axis=0) <= found).all()
    assert (found <= honest.max(axis=0)).all()


@light
@given(majorities(), st.randoms(use_true_random=False))
def test_so_is_a_trimmed_mean_that_cuts_as_many_as_are_poisoned(drawn, random):
    honest, poisoned = drawn
    assume(len(poisoned) > 0)
    rows = [*honest, *poisoned]
    random.shuffle(rows)
    found = trimmed_mean(np.stack(rows), len(poisoned) / len(rows))
    assert (honest.min(axis=0) <= found).all()
    assert (found <= honest.max(axis=0)).all()


@light
@given(arrays(np.float32, array_shapes(max_dims=2), elements=numbers), st.floats(0.01, 0.49), st.randoms(use_true_random=False))
def test_coordinate_wise_rules_know_no_order(stack, trim, random):
    rows = list(range(len(stack)))
    random.shuffle(rows)
    for rule in (median, lambda one: trimmed_mean(one, trim)):
        assert np.array_equal(rule(stack), rule(stack[rows]))


@light
@given(st.integers(0, 2**32), st.integers(1, 2), st.randoms(use_true_random=False))
def test_krum_knows_no_order(seed, byzantine, random):
    points = np.random.default_rng(seed).normal(size=(2 * byzantine + 4, 3))
    distances = np.square(points[:, None] - points).sum(axis=2)
    rows = list(range(len(points)))
    random.shuffle(rows)
    chosen = select(distances[np.ix_(rows, rows)], byzantine, 3)
    assert sorted(rows[one] for one in chosen) == select(distances, byzantine, 3)


def test_krum_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="too few"):
        select(np.zeros((6, 6)), 2, 1)


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_updates_are_their_own_aggregate_to_the_bit(write, merge, rule, count):
    value = np.array([1 / 3, 1e-45, 3.4e38, -7], np.float32)
    shares = [Share(number, 1 + number, write(number, w=value)) for number in range(count)]
    undecided = count <= 2 and rule.endswith("krum")  # two updates of which one may be poisoned
    assert merge(rule, shares).tobytes() == (np.ones(4, np.float32) if undecided else value).tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_blocks_change_no_bit(monkeypatch, write, merge, rule):
    random = np.random.default_rng(0)
    shares = [Share(number, 1 + number, write(number, w=random.normal(size=(1, 5, 7)))) for number in range(6)]
    whole = merge(rule, shares, clip_norm="median")
    monkeypatch.setattr(updates, "BLOCK_NUMBERS", 20)
    assert merge(rule, shares, clip_norm="median").tobytes() == whole.tobytes()


@pytest.mark.parametrize("rule", RULES)
def test_tensors_without_dimensions_and_without_numbers(write, merge, rule):
    shares = [Share(number, 1, write(number, w=value)) for number, value in enumerate((1, 1, 1, 1, 9))]
    assert merge(rule, shares, clip_norm="median").shape == ()
    empty = [Share(number, 1, write(number, w=np.ones((0, 3)))) for number in range(5)]
    assert merge(rule, empty, clip_norm=1).shape == (0, 3)


@light
@given(array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6), st.integers(1, 40))
def test_blocks_make_up_the_tensor(shape, limit):
    times = np.zeros(shape, int)
    for index in cut(shape, limit):
        assert times[index].size <= limit
        times[index] += 1
    assert (times == 1).all()


@pytest.mark.parametrize("rule", RULES)
def test_memory_does_not_grow_with_model_times_devices(monkeypatch, write, merge, rule):
    """40 updates of 0.4 MB."""
    random = np.random.default_rng(0)
    shares = [Share(number, 1, write(number, w=random.normal(size=(100, 1000)))) for number in range(40)]
    monkeypatch.setattr(updates, "BLOCK_NUMBERS", 50_000)
    before = np.zeros((100, 1000), np.float32)
    tracemalloc.start()
    try:
        merge(rule, shares, before, clip_norm="median")
        assert tracemalloc.get_traced_memory()[1] < 6e6
    finally:
        tracemalloc.stop()
