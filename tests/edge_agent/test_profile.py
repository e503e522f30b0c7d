"""What `edge-agent profile` chooses, says and writes; measuring itself is tested in test_profiling.py."""

import contextlib
import json
import xml.etree.ElementTree as ElementTree

import pytest
from click.testing import CliRunner

from lwfed.config import load_config
from lwfed.edge_agent.cli import main
from lwfed.edge_agent.profiling import command, condition, measure
from lwfed.edge_agent.profiling.cases import PAPER, PAPER_LESS, judge, make_cases, recommend
from lwfed.edge_agent.profiling.condition import Condition
from lwfed.edge_agent.profiling.limits import Limit, NoGroup
from lwfed.edge_agent.profiling.measure import DidNotFit, Measured, Sample
from lwfed.edge_agent.profiling.memory import Footprint
from lwfed.edge_agent.profiling.page import WIDTH, _beside, bars
from lwfed.errors import ConfigError, MissingDependency


def cases(*settings, **asked):
    wanted = {name: asked.get(name) for name in ("strategies", "stages", "threads", "limits")}
    return [
        (case.strategy, case.stage, case.config.train.threads, case.limit_mb)
        for case in make_cases(load_config("base", settings), **wanted)
    ]


def test_first_middle_and_last_stage_of_the_configured_strategy():
    assert cases() == [("layer_wise", stage, 1, None) for stage in (1, 6, 12)]
    assert cases("stages.strategy=end_to_end") == [("end_to_end", 1, 1, None)]
    assert cases("model.depth=1", "stages.rounds=1") == [("layer_wise", 1, 1, None)]


def test_strategies_threads_and_limits_are_combined():
    assert cases(strategies=("progressive", "end_to_end"), stages=(2, 12)) == [
        ("progressive", 2, 1, None),
        ("progressive", 12, 1, None),
        ("end_to_end", 1, 1, None),
    ]
    assert cases(stages=(1,), threads=(1, 4), limits=(512, 2000)) == [
        ("layer_wise", 1, threads, limit) for threads in (1, 4) for limit in (512, 2000)
    ]


@pytest.mark.parametrize(("strategies", "stage"), [(None, 13), (("end_to_end",), 2), (("end_to_end", "progressive"), 13)])
def test_a_stage_that_does_not_exist_is_named_with_those_that_do(strategies, stage):
    with pytest.raises(ConfigError, match=rf"--stages {stage}: \w+ has stages 1 to "):
        cases(strategies=strategies, stages=(stage,))


def record(strategy="layer_wise", stage=1, peak=500.0, threads=1, limit=None, step=2.0, **changes):
    memory = {"peak_mb": peak, "baseline_mb": 300.0, "training_mb": peak - 300, "swap_mb": 0.0, "files_mb": 1.0, "group_peak_mb": None}
    planned = {"prefix": "torch", "micro_batch": 10, "reason": "as configured", "needs_mb": 0.0}
    figures = {"memory": memory, "planned": planned, "step_s": step, "epoch_s": 9 * step, "bytes_down": 10, "bytes_up": 10, "gmacs": 5.0}
    return {"strategy": strategy, "stage": stage, "threads": threads, "limit_mb": limit, **figures, **changes}


def left_out(reason, **changes):
    return {name: value for name, value in record(**changes).items() if name not in ("memory", "planned", "step_s", "epoch_s")} | {
        "reason": reason
    }


def advise(*records, budget=600.0, settings=()):
    return recommend([judge(one, budget) for one in records], budget, load_config("base", settings))


def test_a_strategy_that_fits_with_some_threads_only_is_recommended_with_those():
    records = [record(threads=1, step=3.0, fits=True), record(threads=4, step=1.0, fits=False)]
    found = recommend(records, 520.0, load_config("base"))
    assert (found["strategy"], found["threads"]) == ("layer_wise", 1)
    assert "not with threads: 4" in found["texts"][0]


def test_the_first_strategy_that_fits_is_recommended_with_its_fastest_threads():
    found = advise(
        record("end_to_end", peak=900),
        record(stage=1, peak=400, threads=1),
        record(stage=12, peak=500, threads=1),
        record(stage=1, peak=410, threads=2, step=1.0),
        record(stage=12, peak=511, threads=2, step=1.5),
    )
    assert (found["strategy"], found["threads"], found["memory_mb"]) == ("layer_wise", 2, 570)
    assert found["texts"][0] == "end_to_end does not fit into 600 MB: it takes 900 MB."
    assert "allow the agent 570 MB" in found["texts"][-1]
    assert advise(record(peak=590))["memory_mb"] == 600  # no more than there is


def test_one_stage_that_does_not_fit_is_too_many():
    found = advise(record(stage=1, peak=400), left_out("it does not fit: ended by SIGKILL", stage=12), settings=["train.micro_batch=null"])
    assert found["strategy"] is None
    assert "ended by SIGKILL" in found["texts"][0]
    assert "train.micro_batch" in found["texts"][-1]
    assert "train.micro_batch" not in advise(record(peak=700), settings=["train.micro_batch=16"])["texts"][-1]


def test_a_case_under_a_limit_fits_when_it_stays_within():
    assert judge(record(limit=512, peak=510), 100.0)["fits"]
    assert not judge(record(limit=512, peak=520), 1000.0)["fits"]
    assert not judge(left_out("no such limit: no systemd-run", limit=512), 1000.0)["fits"]


def test_each_limit_is_judged_apart():
    texts = advise(record(limit=512, peak=510), record(limit=400, peak=390), left_out("it does not fit: SIGKILL", limit=350))["texts"]
    assert [text.partition(":")[0] for text in texts] == [
        "layer_wise fits into 512 MB",
        "layer_wise fits into 400 MB",
        "layer_wise does not fit into 350 MB",
        "Recommended",
    ]


def test_the_factors_of_the_paper():
    for strategy, printed in PAPER_LESS.items():
        ratios = {name: figure / PAPER[strategy][name] for name, figure in PAPER["end_to_end"].items()}
        assert ratios == pytest.approx(printed, rel=0.005)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("0x0", "none"),
        ("0x50005", "under-voltage now, throttled now, under-voltage since the start, throttled since the start"),
        ("80000", "soft temperature limit since the start"),
    ],
)
def test_throttling_of_a_raspberry_pi(tmp_path, flags, text):
    file = tmp_path / condition.PI_FILE
    file.parent.mkdir(parents=True)
    file.write_text(flags + "\n")
    assert condition.condition(tmp_path).throttling == text


def test_throttling_of_other_processors(tmp_path, monkeypatch):
    for core, count in enumerate((3, 4)):
        file = tmp_path / f"devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count"
        file.parent.mkdir(parents=True)
        file.write_text(f"{count}\n")
    assert condition.condition(tmp_path).throttling == "7 times since the start"


def test_what_sensors_do_not_say_is_not_readable(tmp_path, monkeypatch):
    monkeypatch.delattr(condition.psutil, "sensors_temperatures", raising=False)
    monkeypatch.setattr(condition.psutil, "cpu_freq", lambda: None)
    found = condition.condition(tmp_path)
    assert (found.temperature_c, found.frequency_mhz, found.throttling) == (None, None, None)
    assert found.text.startswith("temperature not readable here, clock not readable here, throttling not readable here")
    assert Condition(61.6, 1500.0, "none", 0.5).text == "temperature 62 C, clock 1500 MHz, throttling none, load 0.5"


def test_bars_are_svg_with_the_budget_where_it_is_in_sight():
    rows = [("layer_wise 1 <", (300.0, 100.0), True), ("end_to_end 1", (300.0, 600.0), False)]
    drawn = ElementTree.fromstring(bars(rows, "MB", 500.0))
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(one.get("width")) for one in drawn.iter(f"{space}rect")]
    assert widths[3] == pytest.approx(6 * widths[1], rel=0.01)
    assert len(list(drawn.iter(f"{space}line"))) == 1
    (line,) = ElementTree.fromstring(bars(rows, "MB", 1500.0)).iter(f"{space}line")
    assert float(line.get("x1")) < WIDTH - 80
    assert not list(ElementTree.fromstring(bars(rows, "MB", 5000.0)).iter(f"{space}line"))


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs the command with figures in place of measurements: MB of each (strategy, stage), or what is raised; None dies."""
    asked = []

    def run(*arguments, peaks, baseline=300.0, problem="", needs_mb=0.0):
        def sampled(config, stage, steps):
            return contextlib.nullcontext(Sample(tmp_path, tmp_path, {}, {}, None, "", 100, 4_000_000, 2_000_000, 5e9))

        def agent(config, sample, stage, on_step, on_ready, limit, budget_mb, enough_s):
            asked.append((config.stages.strategy, stage, limit.mb, budget_mb))
            on_ready(baseline)
            peak = peaks[config.stages.strategy, stage]
            if isinstance(peak, BaseException):
                raise peak
            if peak is None:
                raise DidNotFit("ended by SIGKILL")
            on_step(1, 2)
            planned = {"prefix": "onnx_int8", "micro_batch": 10, "reason": "onnx_int8 531 views/s", "needs_mb": needs_mb}
            return Measured((2.0, 3.0), (), Footprint(peak, baseline, peak - 30, 30.0, 0.0, 1.0, False, "VmHWM", None), planned)

        monkeypatch.setattr(measure, "sampled", sampled)
        monkeypatch.setattr(measure, "agent", agent)
        monkeypatch.setattr(command, "LIMITS", lambda mb: Limit(mb, problem=problem))
        return CliRunner().invoke(main, ["profile", *arguments, "--out", str(tmp_path / "out")])

    run.asked = asked
    return run


def test_the_table_the_page_and_the_report_say_what_fits(measured, tmp_path):
    peaks = {("layer_wise", 1): 450.0, ("layer_wise", 12): 500.0, ("end_to_end", 1): 4000.0}
    done = measured("--stages", "1,12", "--strategies", "layer_wise,end_to_end", "--budget", "600", "--images", "1024", peaks=peaks)
    assert done.exit_code == 0, done.output
    assert "layer_wise fits into 600 MB: the measured stages take up to 500 MB." in done.stdout
    assert "end_to_end does not fit into 600 MB: it takes 4000 MB." in done.stdout
    assert measured.asked == [(*place, None, 600.0) for place in peaks]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [case["fits"] for case in report["cases"]] == [True, True, False]
    assert {case["epoch_s"] for case in report["cases"]} == {5.0}
    assert report["recommended"]["memory_mb"] == 550
    assert (report["codec"], report["interrupted"]) == ("int8", "")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "<td>2.61 (3.34x less)</td><td>139 (4.20x less)</td><td>1.66 (5.07x less)</td>" in page, "as the paper has them"
    assert "<td>8.72</td><td>586</td><td>8.4</td>" in page
    assert "$" not in page
    assert not any(word in page for word in ("<script", '<link rel="stylesheet', "http-equiv", "<img"))


@pytest.mark.parametrize(
    ("budget", "drawn", "says"),
    [("600", 1, "Dashed: the budget of 600 MB."), ("6000", 0, "The budget of 6000 MB lies further to the right.")],
)
def test_a_budget_beside_which_bars_would_be_short_is_said_and_not_drawn(measured, tmp_path, budget, drawn, says):
    measured("--stages", "12", "--budget", budget, peaks={("layer_wise", 12): 500.0})
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("stroke-dasharray") == drawn
    assert f" {says} " in page


@pytest.mark.parametrize(("gmacs", "shown"), [(0.254, "0.254"), (139.04, "139")])
def test_few_operations_are_not_shown_as_none(gmacs, shown):
    assert _beside([record(peak=400) | {"gmacs": gmacs}])[1] == shown


def test_what_was_measured_before_ctrl_c_is_kept_printed_and_marked(measured, tmp_path):
    done = measured("--stages", "1,6,12", "--budget", "600", peaks={("layer_wise", 1): 450.0, ("layer_wise", 6): SystemExit(130)})
    assert done.exit_code == 130
    assert done.stdout.startswith("Interrupted: 1 of 3 cases were measured.\n")
    assert "layer_wise fits into 600 MB: the measured stages take up to 450 MB." in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert ([case["stage"] for case in report["cases"]], report["interrupted"]) == ([1], "Interrupted: 1 of 3 cases were measured.")
    assert "<b>Interrupted: 1 of 3 cases were measured.</b>" in (tmp_path / "out" / "report.html").read_text()


def test_ctrl_c_before_anything_was_measured_leaves_nothing(measured, tmp_path):
    done = measured("--stages", "1", peaks={("layer_wise", 1): SystemExit(130)})
    assert (done.exit_code, done.stdout, list((tmp_path / "out").iterdir())) == (130, "", [])


def test_the_codec_that_bytes_were_measured_in_is_named(measured, tmp_path):
    done = measured("--stages", "12", "--set", "transfer.codec=int8", "--set", "transfer.top_k=0.25", peaks={("layer_wise", 12): 500.0})
    assert "MB down and up: a round in the codec int8, top_k 0.25 (transfer.codec)" in done.stdout
    assert json.loads((tmp_path / "out" / "report.json").read_text())["codec"] == "int8, top_k 0.25"
    assert (tmp_path / "out" / "report.html").read_text().count("a round, int8, top_k 0.25</th>") == 2


def test_the_recommended_memory_is_what_planning_wants_where_that_is_more_than_the_peak(measured, tmp_path):
    done = measured("--stages", "12", "--budget", "900", peaks={("layer_wise", 12): 420.0}, needs_mb=507.0)
    assert "allow the agent 510 MB" in done.stdout


def test_it_ends_with_1_where_the_strategy_does_not_fit(measured):
    done = measured("--stages", "12", "--json", peaks={("layer_wise", 12): None})
    assert done.exit_code == 1
    (case,) = json.loads(done.stdout)["cases"]
    assert case["reason"] == "it does not fit: ended by SIGKILL"
    assert case["bytes_up"] == 2_000_000


def test_a_limit_that_cannot_be_had_is_left_out_with_its_reason(measured):
    done = measured("--stages", "12", "--limits", "512", peaks={}, problem="there is no systemd-run here")
    assert "layer_wise was not tried in 512 MB: no such limit: there is no systemd-run here" in done.stdout
    assert "Nothing was tried." in done.stdout
    assert "train.batch_size" not in done.stdout
    assert (done.exit_code, measured.asked) == (MissingDependency.exit_code, [])


def test_a_case_whose_group_can_no_longer_be_made_is_left_out_and_the_others_are_measured(measured):
    peaks = {("layer_wise", 1): NoGroup("no group can be made in /box: No such device"), ("layer_wise", 12): 500.0}
    done = measured("--stages", "1,12", "--limits", "512", "--json", peaks=peaks)
    first, last = json.loads(done.stdout)["cases"]
    assert (first["skipped"], first["reason"]) == (True, "no such limit: no group can be made in /box: No such device")
    assert (last["fits"], done.exit_code) == (True, 0)


def test_what_was_planned_and_why_is_in_the_table_and_on_the_page(measured, tmp_path):
    done = measured("--stages", "12", "--budget", "600", peaks={("layer_wise", 12): 500.0})
    row = next(line for line in done.stdout.splitlines() if line.startswith("layer_wise "))
    assert row.split()[-3:] == ["onnx_int8", "10", "yes"]
    assert "layer_wise 12, 1 thr.: onnx_int8 531 views/s" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<td>onnx_int8</td><td>10</td>" in page
    assert "<li>layer_wise 12, 1 thr.: onnx_int8 531 views/s</li>" in page
    assert "<td>500</td><td>5</td><td>6.0</td>" in page, "beside the paper: peak, operations, bytes"


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--budget", "250"], 78, "--budget 250: the agent with torch takes 300 MB here before any data"),
        (["--stages", "13"], 78, "--stages 13: layer_wise has stages 1 to 12 here"),
        (["nowhere.yaml"], 78, "'nowhere.yaml' cannot be read"),
        (["--strategies", "layerwise"], 2, "layer_wise"),
    ],
)
def test_what_cannot_be_measured_ends_with_its_code(measured, arguments, code, text):
    done = measured(*arguments, peaks={("layer_wise", stage): 500.0 for stage in (1, 6, 12)})
    assert done.exit_code == code
    assert text in done.stderr


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(measured, tmp_path):
    (tmp_path / "out").touch()
    done = measured(peaks={})
    assert done.exit_code == 73
    assert "choose another --out" in done.stderr
    assert measured.asked == []
