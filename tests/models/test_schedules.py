import pytest

from lwfed.models.schedules import learning_rate


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [("fixed", 0.0, 3e-4), ("fixed", 1.0, 3e-4), ("cosine", 0.0, 3e-4), ("cosine", 0.5, 1.5e-4), ("cosine", 1.0, 0.0)],
)
def test_learning_rate(schedule, progress, expected):
    assert learning_rate(1.5e-4, 512, schedule, progress) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress_outside_the_run(progress):
    with pytest.raises(ValueError, match="progress"):
        learning_rate(1e-3, 256, "cosine", progress)
