import pytest

from lwfed.config import load_config
from lwfed.models.schedules import learning_rate
from lwfed.plan import Place

MIDDLE = Place(round=50, rounds=100, stage_round=5, stage_rounds=10, lr_scale=0.25)


def rate(place, part=0.0, *settings, batch=512):
    train = load_config("paper", [f"train.{setting}" for setting in settings]).train
    return learning_rate(1.5e-4, batch, train, place, part)


@pytest.mark.parametrize(
    ("place", "settings", "expected"),
    [
        (MIDDLE, ["lr_schedule=fixed"], 3e-4),
        (MIDDLE, ["lr_schedule=fixed", "lr_scaling=none"], 1.5e-4),
        (Place(0, 100, 0, 10), ["lr_schedule=cosine"], 3e-4),
        (MIDDLE, ["lr_schedule=cosine"], 1.5e-4),
        (Place(90, 100, 0, 10), ["lr_schedule=cosine_per_stage"], 3e-4),
        (MIDDLE, ["lr_schedule=cosine_per_stage"], 1.5e-4),
        (MIDDLE, ["lr_schedule=plateau"], 0.75e-4),
        (MIDDLE, ["lr_schedule=cyclical", "cycle_rounds=10"], 3e-4),
        (MIDDLE, ["lr_schedule=cyclical", "cycle_rounds=40"], 1.5e-4),
        (MIDDLE, ["lr_schedule=cyclical", "cycle_rounds=20"], 0.0),
        (MIDDLE, ["lr_schedule=fixed", "warmup_rounds=75"], 2e-4),
        (MIDDLE, ["lr_schedule=cosine_per_stage", "warmup_rounds=8"], 1.875e-4),
        (Place(0, 1, 0, 1), ["lr_schedule=cosine", "warmup_rounds=20"], 3e-4),
        (Place(60, 100, 0, 10), ["lr_schedule=cosine", "warmup_rounds=20"], 1.5e-4),
    ],
)
def test_learning_rate(place, settings, expected):
    assert rate(place, 0.0, *settings) == pytest.approx(expected, abs=1e-12)


def test_the_rate_follows_the_steps_within_a_round_and_is_0_at_the_end_of_the_run():
    last = Place(99, 100, 9, 10)
    assert rate(last, 0.0) > rate(last, 0.5) > rate(last, 1.0) == 0


@pytest.mark.parametrize("part", [-0.1, 1.1, float("nan")])
def test_a_part_outside_the_round(part):
    with pytest.raises(ValueError, match="part"):
        rate(MIDDLE, part)
