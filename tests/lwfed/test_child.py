import fcntl
import os
import queue
import select
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lwfed.child import Child, Ended, describe_exit, kind_of_error
from lwfed.errors import WorkerFailed

HERE = str(Path(__file__).parent)
LONG_S = 30


@pytest.fixture
def events():
    return queue.Queue()


@pytest.fixture
def child(events):
    child = Child("echo_child", events.put, env={"PYTHONPATH": HERE})
    assert events.get(timeout=LONG_S).data == {"event": "ready"}
    yield child
    child.kill()
    child.close()


def test_lines_go_both_ways_and_library_noise_does_not_mix_in(child, events):
    child.send({"do": "echo", "text": "ä\n"})
    assert events.get(timeout=LONG_S).data == {"event": "echo", "text": "ä\n"}


def test_an_error_is_said_and_the_child_goes_on(child, events):
    for order in ({"do": "fail"}, {"do": "exhaust"}, {"do": "stumble"}, {"do": "echo", "text": "still here"}):
        child.send(order)
    assert events.get(timeout=LONG_S).data == {"event": "error", "kind": "DataError", "message": "no images in /nowhere"}
    assert events.get(timeout=LONG_S).data["kind"] == "OutOfMemory"
    assert events.get(timeout=LONG_S).data["message"] == "KeyError: 'nobody expected this'"
    assert events.get(timeout=LONG_S).data["text"] == "still here"


@pytest.mark.parametrize(
    ("signal", "risen", "kind", "cause"),
    [
        ("SIGKILL", True, "out of memory", ": memory ran out"),
        ("SIGKILL", False, "killed", "memory had not run out"),
        ("SIGKILL", None, "out of memory", "probably"),
        ("SIGSEGV", True, "crashed", "SIGSEGV"),
        ("SIGTERM", True, "killed", "SIGTERM"),
        ("40", True, "killed", "ended by signal 40"),  # one for real time, without a name
    ],
)
def test_its_death_is_an_event_that_names_the_likely_cause(events, monkeypatch, signal, risen, kind, cause):
    monkeypatch.setattr("lwfed.child.OomKills", lambda: SimpleNamespace(happened=lambda: risen))
    child = Child("echo_child", events.put, env={"PYTHONPATH": HERE})
    assert events.get(timeout=LONG_S).data == {"event": "ready"}
    child.send({"do": "die", "signal": signal})
    ended = events.get(timeout=LONG_S)
    assert isinstance(ended, Ended)
    assert ended.kind == kind
    assert signal in ended.reason
    assert cause in ended.reason
    child.send({"do": "echo", "text": "to nobody"})  # must not raise
    child.close()


def test_a_library_that_finds_no_memory_says_so_in_its_own_words():
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("Failed to allocate memory")):
        assert kind_of_error(error) == "OutOfMemory"
    assert kind_of_error(KeyError("memory")) == "WorkerFailed"


def test_what_cannot_be_started_is_said_and_leaves_nothing_open(events, monkeypatch):
    def open_files():
        return len(os.listdir("/proc/self/fd"))

    def nothing_left(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    def no_threads(*_, **__):
        raise RuntimeError("can't start new thread")

    before, children = open_files(), psutil.Process().children()
    for name, fails in (("lwfed.child.subprocess.Popen", nothing_left), ("lwfed.child.threading.Thread.start", no_threads)):
        with monkeypatch.context() as patch:
            patch.setattr(name, fails)
            with pytest.raises(WorkerFailed, match=r"temporarily unavailable|start new thread"):
                Child("echo_child", events.put, env={"PYTHONPATH": HERE})
        assert open_files() <= before
    assert set(psutil.Process().children()) <= set(children)


def test_an_order_is_handed_over_before_the_child_can_read_it(events):
    """Its parent has others to answer meanwhile."""
    text = "x" * 500_000
    ours, theirs = os.pipe()
    try:
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, len(text) + 100)
    except OSError as error:
        pytest.skip(f"this user's pipes have no room left: {error}")
    finally:
        os.close(ours)
        os.close(theirs)
    child = Child("echo_child", events.put, within=["sh", "-c", 'kill -STOP $$; exec "$@"', "-"])
    sending = threading.Thread(target=child.send, args=({"do": "echo", "text": text},), daemon=True)
    try:
        sending.start()
        sending.join(LONG_S)
        assert not sending.is_alive()
    finally:
        child.kill()
        child.close()


def test_a_line_cut_off_by_its_death_is_no_event(child, events):
    child.send({"do": "die in the middle of a line"})
    assert isinstance(events.get(timeout=LONG_S), Ended)


def test_it_ends_when_its_parent_is_killed():
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import queue; from lwfed.child import Child; events = queue.Queue(); child = Child('echo_child', events.put);"
            "events.get(); print(child.pid, flush=True); events.get()",
        ],
        env={**os.environ, "PYTHONPATH": HERE},
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    watch = os.pidfd_open(pid) if os.path.exists(f"/proc/{pid}") else None
    if watch is not None:  # a pidfd becomes readable when the process ends
        assert select.select([watch], [], [], LONG_S)[0], "the child outlived its parent"
        os.close(watch)


def test_exits_are_described_for_people():
    assert describe_exit(3).startswith("ended with exit code 3: ")
    assert "doctor" in describe_exit(-4)
    assert describe_exit(-15) == "ended by SIGTERM"
