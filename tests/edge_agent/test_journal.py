import contextlib
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from lwfed.edge_agent.facts import MemoryFacts, SqliteFacts
from lwfed.edge_agent.journal import Accepted, Journal, Planned, Seen, Update
from lwfed.errors import StateError
from lwfed.wire.messages import BlobRef, Task
from lwfed.wire.report import Execution, Memory, Report, Traffic
from lwfed.wire.topics import is_name

TASK = Task(run="demo", stage=1, round=2, participant=3)
EXECUTION = Execution(prefix="torch", micro_batch=16, precision="fp32", threads=1, torch="2.9", machine="x86")
PLANNED = Planned(least="onnx_int8", features_in_memory=True)
REPORT = Report(
    images=8,
    skipped=0,
    steps=1,
    losses=(1.0,),
    seconds=1,
    memory=Memory(baseline_mb=1, peak_mb=2, peak_source="VmHWM", curve=()),
    execution=EXECUTION,
)
UPDATE = Update(task=TASK, blob=BlobRef(id="0" * 64, size=5), chunk_bytes=1024, report=REPORT)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.sqlite"


def test_how_a_stage_is_computed_is_kept_with_the_version_of_onnx_runtime_and_read_without(path):
    journal = Journal(path)
    by_onnx = EXECUTION.model_copy(update={"prefix": "onnx", "onnxruntime": "1.20"})
    journal.fix_execution("demo", 1, EXECUTION, PLANNED)
    journal.fix_execution("demo", 2, by_onnx, PLANNED)
    assert (journal.execution("demo", 1), journal.execution("demo", 2)) == (EXECUTION, by_onnx)
    journal.close()


def test_how_often_a_task_has_failed_outlasts_the_agent_and_is_of_that_task_alone(path):
    for attempt in (1, 2):
        journal = Journal(path)
        assert journal.fail(TASK) == attempt
        journal.close()
    journal = Journal(path)
    assert journal.fail(TASK.model_copy(update={"round": 3})) == 1
    journal.close()


def test_the_device_keeps_its_id_and_counts_its_starts(path):
    journal = Journal(path, "Küche 2")
    assert is_name(journal.device)
    assert journal.device.startswith("k-che-2-")
    journal.close()
    again = Journal(path, "another name")
    assert (again.device, again.boot) == (journal.device, journal.boot + 1)
    again.close()


def test_two_devices_of_one_name_differ(tmp_path):
    journals = [Journal(tmp_path / str(number), "pi") for number in range(2)]
    assert journals[0].device != journals[1].device
    for journal in journals:
        journal.close()


def test_everything_comes_back(path):
    journal = Journal(path)
    assert (journal.task, journal.update, journal.execution("demo", 1), journal.seen) == (None, None, None, Seen(epoch=0, seq=0))
    journal.begin(TASK)
    journal.fix_execution("demo", 1, EXECUTION, PLANNED)
    journal.count("demo", Traffic(down=7, up=9))
    journal.saw(Seen(epoch=3, seq=4))
    journal.close()
    journal = Journal(path)
    assert (journal.task, journal.execution("demo", 1), journal.seen) == (TASK, EXECUTION, Seen(epoch=3, seq=4))
    assert (journal.planned("demo", 1), journal.planned("demo", 2)) == (PLANNED, None)
    assert journal.traffic("demo") == Traffic(down=7, up=9)
    assert journal.traffic("other") == Traffic(down=0, up=0)
    journal.finish(UPDATE)
    assert (journal.task, journal.update) == (None, UPDATE)
    journal.settle()
    assert (journal.update, journal.accepted) == (None, None)
    journal.finish(UPDATE)
    journal.settle(Accepted(task=TASK, epoch=3))
    assert (journal.update, journal.accepted) == (None, Accepted(task=TASK, epoch=3))
    journal.close()


def test_the_least_that_a_training_process_has_taken_is_remembered_for_each_torch(path):
    journal = Journal(path)
    assert journal.baseline_mb("2.9") is None
    for mb in (180.0, 170.5, 190.0):
        journal.note_baseline("2.9", mb)
    journal.keep_run("demo")
    journal.close()
    journal = Journal(path)
    assert (journal.baseline_mb("2.9"), journal.baseline_mb("2.10")) == (170.5, None)
    journal.note_baseline("2.10", 200.0)
    assert (journal.baseline_mb("2.10"), journal.baseline_mb("2.9")) == (200.0, None)
    journal.close()


def taken(journal, *rounds, stage=1):
    for round in rounds:
        task = TASK.model_copy(update={"stage": stage, "round": round})
        journal.finish(UPDATE.model_copy(update={"task": task}))
        journal.settle(Accepted(task=task, epoch=3))


def after(journal, round, stage=1, run="demo"):
    return journal.after(Task(run=run, stage=stage, round=round, participant=3))


def test_it_knows_after_whose_update_a_round_comes_also_when_it_is_repeated(path):
    journal = Journal(path)
    assert after(journal, 5) is None
    taken(journal, 1, 2, 4, 4)
    journal.finish(UPDATE)
    journal.settle()
    journal.close()
    journal = Journal(path)
    assert [after(journal, round) for round in (3, 4, 5, 9)] == [2, 2, 4, 4]
    assert (after(journal, 5, stage=2), after(journal, 5, run="other")) == (None, None)
    journal.lose("demo", 1, 4)
    journal.lose("other", 1, 1)
    assert after(journal, 5) == 4
    taken(journal, 1, stage=2)
    assert (after(journal, 5), after(journal, 2, stage=2)) == (None, 1)
    journal.lose("demo", 1, 9)
    assert after(journal, 2, stage=2) is None
    journal.close()


def test_a_journal_from_before_it_knew_that_is_opened(path):
    facts = SqliteFacts(path)
    task = '{"v":1,"run":"demo","stage":1,"round":2,"participant":3}'
    with facts.transaction():
        facts.put("device", '{"device":"pi-1","boot":4}')
        facts.put("accepted", f'{{"task":{task},"epoch":3}}')
    facts.close()
    journal = Journal(path)
    assert (journal.device, journal.accepted, after(journal, 3)) == ("pi-1", Accepted(task=TASK, epoch=3), None)
    taken(journal, 3)
    assert after(journal, 4) == 3
    journal.close()


def test_announcements_are_ordered_by_epoch_then_number():
    first, second, third = (Seen(epoch=epoch, seq=seq) for epoch, seq in ((1, 9), (2, 0), (2, 1)))
    assert sorted([third, first, second]) == [first, second, third]


def test_only_the_run_that_is_followed_is_remembered(path):
    journal = Journal(path)
    journal.saw(Seen(epoch=1, seq=1))
    for run in ("demo", "demo-2", "1"):
        journal.count(run, Traffic(down=1, up=1))
        journal.fix_execution(run, 1, EXECUTION, PLANNED)
    journal.keep_run("demo")
    none = Traffic(down=0, up=0)
    assert [journal.traffic(run) == none for run in ("demo", "demo-2", "1")] == [False, True, True]
    assert [journal.execution(run, 1) for run in ("demo", "demo-2", "1")] == [EXECUTION, None, None]
    assert journal.seen == Seen(epoch=1, seq=1)
    journal.close()


def test_what_was_written_survives_sigkill(path):
    script = (
        "import os, sys; from lwfed.edge_agent.journal import Journal; from lwfed.wire.messages import Task;"
        f"j = Journal(__import__('pathlib').Path({str(path)!r})); j.begin(Task(run='demo', stage=1, round=2, participant=3));"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    )
    done = subprocess.run([sys.executable, "-c", script])
    assert done.returncode == -signal.SIGKILL
    journal = Journal(path)
    assert (journal.task, journal.boot) == (TASK, 2)
    journal.close()


def test_a_journal_of_a_newer_agent_is_left_alone(path):
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(StateError, match="newer edge-agent"):
        Journal(path)


def test_a_damaged_journal_says_what_to_do(path):
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(StateError, match="move the file away"):
        Journal(path)


def test_a_full_disk_says_what_to_do_and_loses_nothing(path):
    journal = Journal(path)
    journal.begin(TASK)
    journal._facts._db.execute("PRAGMA max_page_count = 2")  # what SQLite says and does then is the same
    large = REPORT.model_copy(update={"losses": (1.0,) * 1000})
    with pytest.raises(StateError, match=r"full\): free space on its disk: nothing is lost"):
        journal.finish(UPDATE.model_copy(update={"report": large}))
    journal.close()
    again = Journal(path)
    assert again.task == TASK
    again.close()


def test_a_journal_that_cannot_be_opened_is_not_to_be_moved(tmp_path):
    with pytest.raises(StateError, match=r"unable to open.*check that its folder may be written"):
        Journal(tmp_path / "missing" / "journal.sqlite")


@pytest.mark.parametrize("key", ["device", "seen", "task", "update", "accepted"])
def test_a_damaged_row_says_what_to_do(path, key):
    journal = Journal(path)
    journal._facts._db.execute("INSERT OR REPLACE INTO facts VALUES (?, 'x y')", (key,))
    with pytest.raises(StateError, match=f"{key} does not parse; move the file away"):
        Journal(path) if key == "device" else getattr(journal, key)
    journal.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_says_what_to_do(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StateError, match="unusable"):
        Journal(tmp_path / "journal.sqlite")


def test_facts_in_memory_are_taken_back_with_a_transaction_that_fails():
    facts = MemoryFacts({"device": '{"device": "pi-1", "boot": 4}'})
    journal = Journal(facts)
    assert (journal.device, journal.boot) == ("pi-1", 5)
    journal.begin(TASK)
    with contextlib.suppress(StateError), facts.transaction():
        facts.drop("task")
        raise StateError
    assert journal.task == TASK
    assert Journal(MemoryFacts(facts.held)).task == TASK
