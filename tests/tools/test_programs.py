import os
import select
import subprocess
import sys

import pytest

from lwfed.errors import WorkerFailed
from lwfed.tools.programs import Programs

LONG_S = 60


def start_server(programs, state):
    programs.start(
        "server", "lwfed.cloud_server.cli", "serve", "--config", "demo", "--broker", "embedded", "--port", "0", "--state", str(state)
    )


def wait_for_end(pid):
    """A pidfd becomes readable when its process has ended."""
    try:
        watch = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ended = bool(select.select([watch], [], [], LONG_S)[0])
    os.close(watch)
    return ended


def test_events_come_in_as_they_are_said_and_all_ends_with_the_block(tmp_path):
    with Programs() as programs:
        start_server(programs, tmp_path)
        broker = programs.next()
        pid = int((tmp_path / "lock").read_text().split()[1])
    assert (broker.program, broker.said["event"], broker.said["kind"]) == ("server", "broker", "embedded")
    assert not os.path.exists(f"/proc/{pid}")


def test_a_program_that_fails_is_reported_with_its_last_words():
    with Programs() as programs:
        programs.start("server", "lwfed.cloud_server.cli", "serve", "--config", "nonsense")
        with pytest.raises(WorkerFailed, match=r"(?s)server ended with exit code 78.*presets: "):
            programs.next()


def test_programs_do_not_outlive_a_killed_demo(tmp_path):
    code = (
        "import sys; from lwfed.tools.programs import Programs\n"
        "with Programs() as programs:\n"
        "    programs.start('server', 'lwfed.cloud_server.cli', 'serve', '--config', 'demo', '--broker', 'embedded', '--port', '0',"
        " '--state', sys.argv[1])\n"
        "    programs.next(); print('up', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as demo:
        assert demo.stdout.readline() == b"up\n"
        pid = int((tmp_path / "lock").read_text().split()[1])
        demo.kill()
    assert wait_for_end(pid), "the server outlived the demo"
