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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_demo_that_is_ended_leaves_no_process_and_no_scratch_behind(tmp_path, number, code):
    demo, scratch = start_demo(tmp_path)
    with demo:
        read_until(demo, "joined")
        pids = [int(lock.read_text().split()[1]) for lock in scratch.glob("*/*/*/lock")]
        demo.send_signal(number)
        assert demo.wait(60) == code
    assert len(pids) >= 2, "the server and a device"
    assert [pid for pid in pids if os.path.exists(f"/proc/{pid}")] == []
    assert list(scratch.iterdir()) == []


def test_a_demo_that_is_to_survive_its_terminal_does(tmp_path):
    demo, _ = start_demo(tmp_path, "nohup")
    with demo:
        read_until(demo, "training")
        demo.send_signal(signal.SIGHUP)
        read_until(demo, "joined")
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60) == 143
