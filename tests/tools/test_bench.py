import json
import re

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from lwfed.config import load_config
from lwfed.edge_agent.profiling.measure import DidNotFit, Measured
from lwfed.edge_agent.profiling.memory import Footprint
from lwfed.errors import WorkerFailed
from lwfed.models.end_to_end import with_our_products
from lwfed.models.kernels import Linear
from lwfed.tools.bench import command, rows
from lwfed.tools.bench.formulas import bytes_moved, whole
from lwfed.tools.bench.report import lines, ratios, totals
from lwfed.tools.bench.rows import BASELINES, Row, blank, estimate_s, make_rows, measure_row
from lwfed.tools.bench.views import measure_views
from lwfed.tools.cli import main


def stage(number, peak=500.0, step=2.0, moved=10, gmacs=5.0, libraries=300.0):
    memory = {"peak_mb": peak, "baseline_mb": libraries, "training_mb": peak - libraries}
    memory |= {"computing_mb": peak - 30, "others_mb": 30.0, "swap_mb": 0.0, "files_mb": 6.0}
    return {"stage": number, "memory": memory, "step_s": step, "cpu_s": step / 2, "epoch_s": 9 * step, "bytes": moved, "gmacs": gmacs}


def row(name, *stages, reason=""):
    return {"name": name, "title": name, "reason": reason, "stages": list(stages)}


CALM = {"interrupted": False, "before": "load 0.1", "after": "load 0.2"}
VIEWS = {"published_us": 500.0, "ours_us": 50.0, "ratio": 10.0}
OURS = row("ours", stage(1, peak=600, step=1.0), stage(2, peak=500, step=3.0))


def test_memory_is_that_of_the_largest_stage_and_time_the_mean():
    found = totals(OURS["stages"])
    assert (found["peak_mb"], found["training_mb"], found["step_s"], found["epoch_s"]) == (600, 300, 2.0, 18.0)


def test_ratios_are_of_the_first_baseline_that_was_measured():
    published = row("published", stage(1, peak=6000, step=20.0, moved=50, gmacs=15.0))
    found = ratios([published, OURS], BASELINES)
    assert {name: found[name] for name in ("against", "peak_memory", "time", "bytes", "flops", "memory_above_libraries")} == {
        "against": "published",
        "peak_memory": 10.0,
        "time": 10.0,
        "bytes": 5.0,
        "flops": 3.0,
        "memory_above_libraries": 19.0,
    }
    assert (found["last_stage"]["peak_memory"], found["last_stage"]["time"]) == (12.0, 6.67)
    assert "same_chunking" not in found


def test_a_baseline_that_was_refused_is_not_compared_with():
    refused = row("published", reason="it takes about 12000 MB, and 900 MB are available")
    pieces, same = row("published_accumulated", stage(1, peak=1200)), row("ours_end_to_end", stage(1, peak=660, step=10.0))
    found = ratios([refused, pieces, OURS, same], BASELINES)
    assert (found["against"], found["peak_memory"]) == ("published_accumulated", 2.0)
    assert (found["same_chunking"]["peak_memory"], found["same_chunking"]["time"]) == (1.1, 5.0)
    broken = row("ours", stage(1), reason="it did not fit into memory")
    assert ratios([pieces, broken], BASELINES) is None
    assert ratios([refused, OURS], BASELINES) is None


def test_the_table_begins_with_the_ratios_and_says_what_was_left_out():
    refused = row("published", reason="it takes about 12000 MB, and 900 MB are available")
    pieces = row("published_accumulated", stage(1, peak=1200))
    found = [refused, pieces, OURS]
    text = "\n".join(lines({"title": "all", "ratios": ratios(found, BASELINES), "rows": found, "views": VIEWS, "notes": ["note"], **CALM}))
    assert text.index("2.00x  less peak memory") < text.index("libraries") < text.index("left out: it takes about 12000 MB")
    assert "against published_accumulated, over 2 stages" in text
    assert "frozen layers" not in text
    planned = {"prefix": "torch", "micro_batch": 8, "reason": "onnxruntime is not installed"}
    told = lines(
        {
            "title": "",
            "ratios": None,
            "rows": [row("ours", {**stage(12), "planned": planned})],
            "views": VIEWS,
            "notes": [],
            "interrupted": False,
        }
    )
    assert "  stage 12: frozen layers by torch, 8 images at a time (onnxruntime is not installed)" in told
    nothing = "\n".join(lines({"title": "all", "ratios": None, "rows": [refused], "views": VIEWS, "notes": [], **CALM}))
    assert "No ratios" in nothing


def test_the_rows_are_the_task_of_the_paper():
    full = {one.name: one for one in make_rows(quick=False)}
    assert {one.config.train.batch_size for one in full.values()} == {512}
    assert {one.config.train.threads for one in full.values()} == {1}
    assert full["ours"].stages == full["naive"].stages == tuple(range(1, 13))
    assert full["ours"].config.train.micro_batch is not None
    quick = [one for one in make_rows(quick=True) if not one.reason]
    assert [(one.name, one.stages) for one in quick] == [("published", (1,)), ("naive", (12,)), ("ours", (12,))]
    assert {one.config.train.batch_size for one in quick} == {128}
    assert 10 < estimate_s(quick) < estimate_s(list(full.values()))


def test_what_another_library_of_products_gains_has_a_row_and_a_ratio(monkeypatch):
    monkeypatch.setattr(rows, "library", lambda: "onednn")
    full = {one.name: one for one in make_rows(quick=False)}
    assert (full["published_kernels"].kernels, full["published_kernels"].reason) == (True, "")
    assert not any(one.kernels for name, one in full.items() if name != "published_kernels")
    monkeypatch.setattr(rows, "library", lambda: "torch")
    assert {one.name: one for one in make_rows(quick=False)}["published_kernels"].reason == "ours are torch's on this machine"
    found = [row("published", stage(1, step=20.0)), row("published_kernels", stage(1, step=8.0)), row("ours", stage(1, step=2.0))]
    compared = ratios(found, BASELINES)
    assert (compared["time"], compared["same_products"]["time"]) == (10.0, 4.0)
    text = "\n".join(lines({"title": "all", "ratios": compared, "rows": found, "views": VIEWS, "notes": [], **CALM}))
    assert "4.00x  less time a step where the baseline has our matrix products" in text


def test_the_baseline_computes_the_same_with_our_products():
    network = nn.Sequential(nn.Linear(8, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2, bias=False)))
    x, before = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), list(network.parameters())
    expected = network(x)
    with_our_products(network)
    assert [type(one) for one in network.modules() if isinstance(one, nn.Linear)] == [Linear, Linear]
    assert all(mine is theirs for mine, theirs in zip(network.parameters(), before, strict=True))
    assert torch.allclose(network(x), expected, atol=1e-6)


def test_true_operations_are_those_of_the_paper_account():
    """In forward passes of a layer: 96 end to end, 30 where both branches run the prefix, 19 where it runs once, and 2 for pieces."""
    found = {one.name: one for one in make_rows(quick=False)}

    def mean(name):
        return sum(found[name].macs(number) for number in found[name].stages) / len(found[name].stages)

    assert mean("published") / mean("naive") == pytest.approx(96 / 30, rel=0.05)
    assert mean("published") / mean("ours") == pytest.approx(96 / 21, rel=0.05)
    assert bytes_moved(found["published"].config, 1) / bytes_moved(found["naive"].config, 12) == pytest.approx(5.07, rel=0.01)
    assert bytes_moved(found["naive"].config, 12) / bytes_moved(found["ours"].config, 12) == pytest.approx(4.5, rel=0.02)


def test_the_estimate_of_memory_is_near_what_was_measured():
    found = {one.name: one for one in make_rows(quick=True)}
    assert found["published"].need_mb(1) == pytest.approx(4066, rel=0.1)
    assert found["published_accumulated"].need_mb(1) < 2000


def test_the_baseline_makes_two_steps_that_count_however_slow(monkeypatch):
    asked = []
    monkeypatch.setattr(
        rows.measure, "published", lambda config, stage, steps, on_step, enough_s, least, *how: asked.append((steps, least))
    )
    for one in make_rows(quick=False):
        if not one.ours:
            one.measure(1, print)
    assert set(asked) == {(3, 2)}


class Fake(Row):
    def measure(self, stage, on_step):
        if stage == 2:
            raise DidNotFit("ended by SIGKILL")
        if stage == 3:
            raise WorkerFailed("the training process ended with exit code 1")
        on_step(1, 2)
        memory = Footprint(500.0, 300.0, 470.0, 30.0, 0.0, 6.0, False, "VmHWM", None)
        return Measured((2.0, 4.0, 3.0), (), memory, cpu_s=(1.9, 2.1, 2.0))


def fake(stages, **changes):
    return Fake("ours", "ours", load_config("base", ["train.batch_size=500"]), stages, True, 3, 1.0, 1, **changes)


def filled(row, on_step):
    record = blank(row)
    measure_row(row, record, on_step)
    return record


def test_a_row_is_the_median_of_its_steps_with_the_costs_of_the_model():
    heard = []
    (found,) = filled(fake((1,)), lambda *step: heard.append(step))["stages"]
    assert (found["step_s"], found["cpu_s"], found["epoch_s"], found["memory"]["training_mb"]) == (3.0, 2.0, 30.0, 200.0)
    assert found["gmacs"] > 0 < found["bytes"]
    assert heard == [(1, 1, 2)]


def test_a_row_that_cannot_be_measured_says_why(monkeypatch):
    assert filled(fake((1,), reason="no compiler"), print)["reason"] == "no compiler"
    found = filled(fake((1, 2)), lambda *_: None)
    assert (found["reason"], len(found["stages"])) == ("it did not fit into memory: ended by SIGKILL", 1)
    found = filled(fake((1, 3)), lambda *_: None)
    assert (found["reason"], len(found["stages"])) == ("the training process ended with exit code 1", 1)
    monkeypatch.setattr(rows.psutil, "virtual_memory", lambda: type("M", (), {"available": 10e6})())
    found = filled(fake((1,)), print)
    assert "10 MB are available" in found["reason"]
    assert found["stages"] == []


@pytest.mark.parametrize("as_json", [True, False])
def test_bench_prints_ratios_first(monkeypatch, as_json):
    def quickly(row, record, on_step):
        record |= {"reason": row.reason, "stages": [] if row.reason else [stage(1)]}

    monkeypatch.setattr(command, "measure_row", quickly)
    monkeypatch.setattr(command, "measure_views", lambda config: VIEWS)
    done = CliRunner().invoke(main, ["bench", "--quick", *(["--json"] if as_json else [])])
    assert done.exit_code == 0, done.output
    assert "takes about" in done.stderr
    if as_json:
        report = json.loads(done.stdout)
        assert next(iter(report)) == "ratios"
        assert report["ratios"]["against"] == "published"
        assert report["views"] == VIEWS
        assert report["before"]["load"] >= 0 <= report["after"]["load"]
    else:
        assert "50 us in blocks, 500 us image by image: 10.0x" in done.stdout
        assert "1.00x  less peak memory" in done.stdout
        assert re.search(r"^Before: .*load [\d.]+\.\nAfter: .*load [\d.]+\.$", done.stdout, re.MULTILINE)
        (header,) = (line for line in done.stdout.splitlines() if "CPU s/step" in line)
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("ours, layer-wise"))
        assert line[: header.index("CPU s/step") + len("CPU s/step")].split()[-2:] == ["2.0", "1.0"]


@pytest.mark.parametrize("as_json", [True, False])
def test_what_was_measured_before_ctrl_c_is_printed_and_marked(monkeypatch, as_json):
    def until_signalled(row, record, on_step):
        if row.reason:
            return
        record["stages"].append(stage(1))
        if row.name == "naive":
            raise SystemExit(130)
        record["reason"] = ""

    monkeypatch.setattr(command, "measure_row", until_signalled)
    monkeypatch.setattr(command, "measure_views", lambda config: VIEWS)
    done = CliRunner().invoke(main, ["bench", "--quick", *(["--json"] if as_json else [])])
    assert done.exit_code == 130
    if as_json:
        report = json.loads(done.stdout)
        assert (report["interrupted"], report["ratios"]) == (True, None)
        assert {one["name"]: (one["reason"], len(one["stages"])) for one in report["rows"] if "only in" not in one["reason"]} == {
            "published": ("", 1),
            "naive": ("interrupted", 1),
            "ours": ("interrupted", 0),
        }
    else:
        assert "Interrupted: what had been measured until then." in done.stdout
        assert "  interrupted after its stage 1" in done.stdout
        assert re.search(r"ours, layer-wise +left out: interrupted", done.stdout)


def test_ctrl_c_before_anything_was_measured_prints_nothing(monkeypatch):
    def signalled(*given):
        raise SystemExit(143)

    monkeypatch.setattr(command, "measure_row", signalled)
    monkeypatch.setattr(command, "measure_views", lambda config: VIEWS)
    done = CliRunner().invoke(main, ["bench", "--quick"])
    assert (done.exit_code, done.stdout) == (143, "")


def test_without_the_libraries_of_the_baseline_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["bench"])
    assert done.exit_code == 72
    assert "lwfed[backbones]" in done.stderr


def test_views_are_timed_in_a_process_of_their_own():
    """Real times; that blocks beat single images does not hang on the machine."""
    found = measure_views(load_config("base"), images=130, turns=3)
    assert found["ratio"] == pytest.approx(found["published_us"] / found["ours_us"], abs=0.1)
    assert found["ratio"] > 2


def test_whole_batches_are_what_the_baseline_is_given():
    config = load_config("base", ["train.micro_batch=16"])
    assert whole(config).train.micro_batch is None
    assert whole(config, 4).train.micro_batch == 4
