import queue
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lwfed.edge_agent import process
from lwfed.edge_agent.events import WorkerError
from lwfed.edge_agent.resources import Meter, available_bytes, resident_mb, share_mb
from lwfed.wire.report import MAX_CURVE

HOG = """
import sys
for line in sys.stdin:
    block = bytearray(int(line))
    del block
    print("done", flush=True)
"""


@pytest.fixture
def hog():
    """A process that takes so many bytes and gives them back, between two samples."""
    with subprocess.Popen([sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def take(count):
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
            process.stdout.readline()

        take(1)  # it has started
        process.take = take
        yield process
        process.kill()


def test_the_peak_between_samples_is_seen_and_does_not_carry_over(hog):
    meter = Meter(psutil.Process(hog.pid))
    meter.take_baseline()
    assert 1 < meter.baseline_mb < 100
    meter.begin(10.0)
    hog.take(200_000_000)
    large = meter.finish(11.5)
    if large.peak_source == "samples":
        pytest.skip("this system has no clear_refs")
    assert large.peak_mb > meter.baseline_mb + 190
    assert [reading.t_s for reading in large.curve] == [0, 1.5]
    meter.begin(20.0)
    hog.take(1_000)
    assert meter.finish(21.0).peak_mb < meter.baseline_mb + 50


def test_without_proc_the_samples_count_and_are_marked(hog, tmp_path):
    meter = Meter(psutil.Process(hog.pid), proc=tmp_path)
    meter.begin(0.0)
    hog.take(100_000_000)
    memory = meter.finish(1.0)
    assert memory.peak_source == "samples"
    assert memory.peak_mb == max(reading.rss_mb for reading in memory.curve)


def test_a_long_curve_is_thinned_evenly(hog):
    meter = Meter(psutil.Process(hog.pid))
    meter.begin(0.0)
    for second in range(1, 300):
        meter.sample(float(second))
    curve = meter.finish(300.0).curve
    assert MAX_CURVE / 2 <= len(curve) <= MAX_CURVE
    assert len({later.t_s - earlier.t_s for earlier, later in pairwise(curve)}) == 1


def test_a_process_that_ended_is_no_error(hog):
    meter = Meter(psutil.Process(hog.pid))
    meter.begin(0.0)
    hog.kill()
    hog.wait()
    meter.sample(1.0)
    assert meter.finish(2.0).peak_mb > 0


def test_of_pages_that_several_processes_hold_each_has_a_share(hog):
    smaps = Path(f"/proc/{hog.pid}/smaps_rollup")
    if not smaps.exists():
        pytest.skip("this system keeps no proportional shares")
    told = {line.split()[0]: int(line.split()[1]) * 1024 / 1e6 for line in smaps.read_text().splitlines()[1:]}
    share = share_mb(psutil.Process(hog.pid))
    assert told["Pss:"] == pytest.approx(share, abs=1)
    assert share < told["Rss:"], "Python's code is shared with this process"
    assert share_mb() <= resident_mb()


def test_without_shares_all_that_is_resident_counts():
    def denied():
        raise psutil.AccessDenied

    resident = SimpleNamespace(rss=5e6)
    for full in (denied, lambda: resident):
        assert share_mb(SimpleNamespace(memory_full_info=full, memory_info=lambda: resident)) == 5.0


def test_what_is_available_is_within_the_limits_of_all_control_groups(tmp_path):
    groups, proc = tmp_path / "cgroup", tmp_path / "self"
    leaf = groups / "system.slice" / "edge-agent.service"
    leaf.mkdir(parents=True)
    proc.write_text("0::/system.slice/edge-agent.service\n")
    unlimited = available_bytes(proc, groups)
    assert unlimited > 10_000_000
    (leaf / "memory.max").write_text("max\n")
    (leaf / "memory.current").write_text("5000000\n")
    assert available_bytes(proc, groups) > 10_000_000
    (leaf.parent / "memory.max").write_text("9000000\n")
    (leaf.parent / "memory.current").write_text("6000000\n")
    assert available_bytes(proc, groups) == 3_000_000
    (leaf / "memory.max").write_text("4000000\n")
    assert available_bytes(proc, groups) == 0
    (leaf / "memory.stat").write_text("anon 1000000\ninactive_file 3500000\n")
    assert available_bytes(proc, groups) == 2_500_000, "cached files give way"
    (leaf / "memory.high").write_text("3000000\n")
    assert available_bytes(proc, groups) == 1_500_000, "beyond it all is slow"
    proc.write_text("0::/elsewhere\n")
    assert available_bytes(proc, groups) > 10_000_000
    assert available_bytes(tmp_path / "none", groups) > 10_000_000


@pytest.mark.parametrize("path", ["/docker/1", "/"])
def test_limits_of_control_groups_of_version_1_count(tmp_path, path):
    proc, group = tmp_path / "self", tmp_path / "cgroup" / "memory" / path.lstrip("/")
    group.mkdir(parents=True)
    proc.write_text(f"11:cpu,cpuacct:/other\n4:memory:{path}\n0::/\n")
    (group / "memory.limit_in_bytes").write_text("9000000\n")
    (group / "memory.usage_in_bytes").write_text("8000000\n")
    (group / "memory.stat").write_text("inactive_file 7\ntotal_inactive_file 500000\n")
    assert available_bytes(proc, tmp_path / "cgroup") == 1_500_000
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert available_bytes(proc, tmp_path / "cgroup") > 10_000_000


@pytest.mark.parametrize("budget_mb", [None, 400.0, 1.0])
def test_of_the_budget_the_training_process_gets_what_its_agent_leaves(monkeypatch, budget_mb):
    sent = []
    child = SimpleNamespace(process=psutil.Process(), send=sent.append)
    monkeypatch.setattr(process, "Child", lambda *_: child)
    monkeypatch.setattr(process, "Meter", lambda _: SimpleNamespace(begin=lambda now: None))
    monkeypatch.setattr(process, "share_mb", lambda: 57.0)
    process.TrainingProcess(sent.append, 1).train({"do": "train", "budget_mb": budget_mb}, 1.0)
    assert sent == [{"do": "train", "budget_mb": {None: None, 400.0: 343.0, 1.0: 0.0}[budget_mb]}]


def test_a_training_process_that_is_gone_before_anybody_looks_at_it_has_ended_like_any_other(monkeypatch):
    said = queue.SimpleQueue()

    class Late(Meter):
        def __init__(self, *watched):
            said.put(said.get(timeout=60))  # its end: what was its pid may belong to anybody by now
            super().__init__(*watched)

    monkeypatch.setattr(process, "WORKER", "missing.module")
    monkeypatch.setattr(process, "Meter", Late)
    gone = process.TrainingProcess(said.put, 1)
    gone.train({"do": "train", "budget_mb": None}, 1.0)
    gone.sample()
    event = gone.hear(said.get())
    assert isinstance(event, WorkerError)
    assert event.message.startswith("the training process ended with exit code 1")
    gone.end()
