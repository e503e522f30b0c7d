import pytest

from lwfed.tools.simulation import curves, report
from lwfed.tools.simulation.records import means, summarise


def run(strategy, seed, *accuracies, probe=0.5):
    stages = [
        {
            "stage": number, "collapsed": False, "loss": 1.0, "knn": knn, "probe": probe,
            "worker_peak_mb": 300.0, "worker_baseline_mb": 250.0,
            "bytes_down": 2_000_000, "bytes_up": 1_000_000, "seconds": 3.0,
        }
        for number, knn in enumerate(accuracies, 1)
    ]  # fmt: skip
    rounds = [{"stage": stage["stage"], "round": 1, "chosen": 2, "contributed": 2, "loss": 1.0, "seconds": 3.0} for stage in stages]
    scores = {"knn": 0.25, "probe": probe}
    places = {"strategy": strategy, "seed": seed, "folder": "out", "encoder_sha256": f"{strategy}{seed}"}
    return {**places, "random": scores, "raw_pixels": scores, "stages": stages, "rounds": rounds}


@pytest.fixture
def whole():
    runs = [run("layer_wise", 0, 0.5, 0.7), run("layer_wise", 1, 0.5, 0.9), run("end_to_end", 0, 0.8), run("end_to_end", 1, 0.8)]
    by_strategy = {name: summarise([one for one in runs if one["strategy"] == name]) for name in ("layer_wise", "end_to_end")}
    return {
        "summary": by_strategy, "runs": runs, "seeds": [0, 1], "data": "digits", "dropout": 0.25, "seconds": 9.0, "command": "x",
        "config": {"data": {"devices": 100}, "rounds": {"sample": 10}}, "versions": {"torch": "2"},
        "machine": {"processor": "p", "cores": 2, "memory_mb": 1, "system": "s", "python": "3"},
    }  # fmt: skip


def test_several_seeds_are_a_mean_and_a_standard_deviation(whole):
    last = whole["summary"]["layer_wise"]["stages"][-1]
    assert last["knn"] == {"mean": pytest.approx(0.8), "spread": pytest.approx(0.02**0.5)}
    assert whole["summary"]["layer_wise"]["total"]["bytes_down"] == {"mean": 4_000_000, "spread": 0}
    assert means(whole["summary"]["end_to_end"])["stages"][0]["knn"] == pytest.approx(0.8)


def test_a_run_that_was_stopped_leaves_the_stages_that_all_have_and_a_collapse_is_marked(whole, capsys, tmp_path):
    runs = [run("layer_wise", 0, 0.5, 0.7), run("layer_wise", 1, 0.1)]
    runs[1]["stages"][0]["collapsed"] = True
    summary = summarise(runs)
    assert [stage["collapsed"] for stage in summary["stages"]] == [True]
    report.show({**whole, "summary": {"layer_wise": summary}}, tmp_path)
    assert "stage 1 collapsed " in capsys.readouterr().out


def test_what_was_not_measured_is_not_made_up():
    summary = summarise([run("layer_wise", seed, 0.5, probe=None) for seed in (0, 1)])
    assert summary["stages"][0]["probe"] is None
    unmeasured = {**run("layer_wise", 0, None, probe=None), "random": None, "raw_pixels": None}
    assert summarise([unmeasured])["random"] is None


def test_tables_have_a_row_for_each_stage_and_strategy(whole, tmp_path, capsys):
    text = report.markdown(whole)
    assert "| after stage 2 | 80.0% ± 14.1 | 50.0% ± 0.0 | 300 | 50 | 2.0 | 1.0 | 3 |" in text
    assert "100 devices with digits, 10 of them in each round; drop-out probability 0.25." in text
    assert "End to end, mean of seeds 0, 1" in text
    report.show(whole, tmp_path)
    shown = capsys.readouterr().out
    assert "after stage 2       80.0%" in shown
    assert "spread of the last  14.1%" in shown


def test_the_picture_can_be_drawn_with_and_without_accuracy(whole):
    assert curves.draw(whole).startswith(b"\x89PNG")
    blind = [
        {**one, "random": None, "raw_pixels": None, "stages": [{**stage, "knn": None, "probe": None} for stage in one["stages"]]}
        for one in whole["runs"]
    ]
    assert curves.draw({**whole, "runs": blind}).startswith(b"\x89PNG")
