import os
import signal
import subprocess
import sys

import pytest


def start_demo(tmp_path, *before):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [*before, sys.executable, "-m", "lwfed.tools.cli", "demo", "--quick", "--out", tmp_path / "out"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(scratch)}), scratch


def read_until(demo, word):
    for line in demo.stdout:
        if word in line:
            return
    pytest.fail(f"the demo ended without saying {word}")


def end(demo, scratch, number, code):
    """With a device that has joined: nothing is left behind."""
    read_until(demo, "joined")
    pids = [int(lock.read_text().split()[1]) for lock in scratch.glob("*/*/*/lock")]
    demo.send_signal(number)
    assert demo.wait(60) == code
    assert len(pids) >= 2, "the server and a device"
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_demo_that_is_ended_leaves_no_process_and_no_scratch_behind(tmp_path, number, code):
    demo, scratch = start_demo(tmp_path)
    with demo:
        end(demo, scratch, number, code)


def test_a_demo_that_is_to_survive_its_terminal_does_and_leaves_nothing_when_it_is_terminated(tmp_path):
    demo, scratch = start_demo(tmp_path, "nohup")
    with demo:
        read_until(demo, "training")
        demo.send_signal(signal.SIGHUP)
        end(demo, scratch, signal.SIGTERM, 143)
