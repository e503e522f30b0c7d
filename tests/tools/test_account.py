import pytest

from lwfed.tools import account


def ended(stage, **figures):
    base = {
        "knn": 0.5, "probe": 0.6, "worker_peak_mb": 290.0, "worker_baseline_mb": 240.0,
        "bytes_down": 1000, "bytes_up": 500, "seconds": 10.0,
    }  # fmt: skip
    return {"event": "stage", "text": "", "time": 1.0, "stage": stage, "stages": 2, "status": "ended", **base, **figures}


EVENTS = [
    {"event": "broker", "text": "", "url": "mqtt://127.0.0.1:1"},
    {"event": "evaluation", "text": "", "stage": 0, "name": "random", "knn": 0.3, "probe": 0.4},
    {"event": "evaluation", "text": "", "stage": 0, "name": "raw_pixels", "knn": 0.9, "probe": 0.8},
    {"event": "stage", "text": "", "stage": 1, "stages": 2, "status": "started"},
    ended(1, worker_peak_mb=310.0, worker_baseline_mb=241.0),
    ended(2, knn=0.7, probe=0.8, bytes_down=2000),
]


def test_baselines_are_found_by_name():
    assert account.baseline(EVENTS, "random") == {"knn": 0.3, "probe": 0.4}
    assert account.baseline(EVENTS, "raw_pixels") == {"knn": 0.9, "probe": 0.8}


def test_stages_hold_the_figures_of_their_end():
    first, second = account.stages(EVENTS)
    assert first == {
        "stage": 1, "knn": 0.5, "probe": 0.6, "worker_peak_mb": 310.0, "worker_baseline_mb": 241.0,
        "bytes_down": 1000, "bytes_up": 500, "seconds": 10.0,
    }  # fmt: skip
    assert (second["stage"], second["knn"], second["bytes_down"]) == (2, 0.7, 2000)


def test_a_run_is_its_last_accuracy_its_largest_memory_and_the_sum_of_the_rest():
    whole = account.total(account.stages(EVENTS))
    assert whole == {
        "knn": 0.7, "probe": 0.8, "worker_peak_mb": 310.0, "worker_baseline_mb": 241.0,
        "bytes_down": 3000, "bytes_up": 1000, "seconds": 20.0,
    }  # fmt: skip
    assert account.training_mb(whole) == pytest.approx(69)
