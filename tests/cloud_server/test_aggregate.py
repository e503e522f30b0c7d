import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lwfed.cloud_server.aggregate import Share, mean_by_part, weighted_mean
from lwfed.cloud_server.sampling import sample
from lwfed.models.shapes import shapes
from lwfed.wire import tensors


@pytest.fixture
def write(tmp_path):
    def write(number, **values):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(tensors.encode({name: np.asarray(value, np.float32) for name, value in values.items()}))
        return path

    return write


def test_the_mean_is_weighted_by_images(write):
    shares = [Share(0, 1, write(0, w=[0.0, 4.0])), Share(1, 3, write(1, w=[4.0, 0.0]))]
    assert dict(weighted_mean(shares, ["w"]))["w"].tolist() == [3.0, 1.0]


def test_the_order_of_arrival_does_not_change_a_bit(write):
    random = np.random.default_rng(0)
    shares = [Share(number, int(random.integers(1, 999)), write(number, w=random.normal(size=300) * 10.0**number)) for number in range(4)]
    results = {dict(weighted_mean(order, ["w"]))["w"].tobytes() for order in itertools.permutations(shares)}
    assert len(results) == 1


def test_a_single_update_is_its_own_mean_to_the_bit(write):
    value = np.array([1 / 3, -0.0, 1e-45, 3e38], np.float32)
    found = dict(weighted_mean([Share(5, 7, write(0, w=value))], ["w"]))["w"]
    assert found.tobytes() == value.tobytes()


def test_extremes_stay_finite(write):
    shares = [Share(number, 2**53 - 1, write(number, w=[3.4e38])) for number in range(3)]
    assert dict(weighted_mean(shares, ["w"]))["w"].tolist() == [np.float32(3.4e38)]


def test_more_updates_than_files_may_be_open(write):
    shares = [Share(number, 1, write(number, w=[float(number)])) for number in range(70)]
    assert dict(weighted_mean(shares, ["w"]))["w"].tolist() == [34.5]


def test_nothing_to_aggregate_is_an_error():
    with pytest.raises(ValueError, match="nothing to aggregate"):
        list(weighted_mean([], ["w"]))


def test_parts_hold_their_own_tensors(tiny, write):
    config = tiny()
    plan = config.plan(2)
    path = write(0, **{name: np.ones(shape) for name, shape in shapes(config, plan.uploaded).items()})
    parts = dict(mean_by_part(config, plan.uploaded, [Share(0, 1, path)]))
    assert tuple(parts) == plan.uploaded == ("layer.2", "norm", "projector", "predictor")
    assert all(name.startswith("blocks.1.") for name in parts["layer.2"])


@given(there=st.sets(st.integers(0, 50), max_size=20), count=st.integers(1, 10), other=st.integers(51, 60))
def test_a_sample_is_stable_and_within_who_is_there(there, count, other):
    chosen = sample(3, 1, 2, there, count)
    assert len(chosen) == min(count, len(there))
    assert set(chosen) <= there
    assert chosen == sample(3, 1, 2, sorted(there, reverse=True), count)
    assert set(sample(3, 1, 2, there | {other}, count)) - {other} <= set(chosen)


def test_samples_of_rounds_differ():
    assert len({sample(0, 1, round, range(10), 3) for round in range(20)}) > 10
