"""Limits of memory: in force where they can be had here, said in words where not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lwfed.control_groups import PROCESSES, VERSION_1, own_group
from lwfed.edge_agent.profiling import limits
from lwfed.edge_agent.profiling.limits import FOLDER, limited

MB = 10**6
HOG = """
import sys
held = bytearray(int(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""
FAMILY = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode != 0)"
PARENT = """
import queue
from lwfed.child import Child
held, events = bytearray(70_000_000), queue.Queue()
child = Child("greedy", events.put)
print(events.get().kind)
child.close()
"""


@pytest.fixture
def group():
    """A control group of 128 MB."""
    limit = limited(128)
    if limit.problem:
        pytest.skip(limit.problem)
    with limit.group() as group:
        yield group


@pytest.fixture
def ours():
    """The control group of this process, and a limit of 128 MB in one below it."""
    limit, group = limited(128), own_group(VERSION_1)
    if limit.problem or group is None:
        pytest.skip(limit.problem or "this system has no control groups of version 1")
    return group, limit


def hog(group, size, *before):
    """A process of the group, that holds so many bytes or has ended."""
    command = [*group.command, sys.executable, *before, "-c", HOG, str(size)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_what_stays_within_its_limit_lives_and_its_group_says_the_peak(group):
    with hog(group, 60 * MB) as process:
        assert 60 < group.peak_mb(process.pid) <= 128
        process.stdin.close()
        assert process.wait() == 0
    assert group.peak_mb(process.pid) is None


def test_what_takes_more_is_ended_by_the_kernel(group):
    with hog(group, 200 * MB) as process:
        assert process.wait() == -signal.SIGKILL


def test_the_limit_is_for_a_program_with_all_its_children(group):
    with hog(group, 60 * MB, "-c", FAMILY) as process:
        assert group.peak_mb(process.pid) > 60
    with hog(group, 200 * MB, "-c", FAMILY) as process:
        assert process.wait() == 1


def test_when_memory_runs_out_the_kernel_ends_a_child_before_its_larger_parent(group, tmp_path):
    """While it makes its imports already."""
    (tmp_path / "greedy.py").write_text("held = bytearray(70_000_000)\n")
    command = [*group.command, sys.executable, "-c", PARENT]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "out of memory\n"), done.stderr


def test_a_group_of_ours_ends_with_all_that_is_still_in_it(ours):
    within, limit = ours
    with limit.group() as group:
        (made,) = within.glob(f"{FOLDER}{os.getpid()}-*")
        process = hog(group, 1)
        assert (made / PROCESSES).read_text().split() == [str(process.pid)]
    with process:
        assert process.wait() == -signal.SIGKILL
    assert not made.exists()


def test_a_group_that_a_killed_measurement_has_left_goes_with_the_next(ours):
    within, limit = ours
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    left, kept = (within / f"{FOLDER}{pid}-abc" for pid in (dead.pid, os.getpid()))
    for folder in (left, kept):
        folder.mkdir()
    try:
        with limit.group():
            assert not left.exists()
            assert kept.exists()
    finally:
        kept.rmdir()


def test_a_limit_above_that_of_a_group_around_it_is_not_pretended(ours):
    within, limit = ours
    with limit.group() as group:
        (around,) = within.glob(f"{FOLDER}{os.getpid()}-*")
        ask = "from lwfed.edge_agent.profiling.limits import limited; print(limited(200).problem, limited(100).problem, sep='; ')"
        done = subprocess.run([*group.command, sys.executable, "-c", ask], capture_output=True, text=True)
    assert done.stdout == f"a group in {around} gives no memory limit: a group around it has only 128.0 MB; \n", done.stderr


@pytest.fixture
def system(tmp_path):
    """Makes what a process of the group /box sees of control groups of that version; what `limited` is given."""

    def make(version):
        own = tmp_path / "self" / "cgroup"
        own.parent.mkdir()
        own.write_text("4:memory:/box\n0::/box\n" if version == 1 else "0::/box\n")
        groups = tmp_path / "groups"
        (groups / "memory" / "box").mkdir(parents=True)
        if version == 2:
            (groups / "cgroup.controllers").write_text("cpu memory\n")
        return own, groups

    return make


@pytest.fixture
def systemd_run(tmp_path, monkeypatch):
    """Puts `script` where systemd-run is looked for."""

    def put(script):
        program = tmp_path / "systemd-run"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


def saying(limits):
    """A systemd-run whose program says that `limits` are in force; $max is what was asked for."""
    asked = "case $1 in --property=MemoryMax=*) max=${1#*Max=};; esac"
    return f'while [ "$1" != -- ]; do {asked}; shift; done; echo {limits} >/dev/fd/$5'


@pytest.mark.parametrize(("page", "size"), [(4096, 499_998_720), (16384, 499_990_528), (65536, 499_974_144)])
def test_a_limit_of_systemd_is_used_when_it_is_in_force(system, systemd_run, monkeypatch, page, size):
    """In whole pages, as the kernel says it."""
    monkeypatch.setattr(limits.os, "sysconf", lambda _: page)
    systemd_run(saying("$max inf inf"))
    found = limited(500, *system(2))
    assert found.problem == ""
    with found.group() as group:
        assert group.command[0] == "systemd-run"
        assert f"--property=MemoryMax={size}" in group.command


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ("echo no bus >&2; exit 1", "no bus"),
        ("exit 0", "it is not seen to be in force"),
        (saying("inf inf $max"), "it is not seen to be in force"),
        (saying("$max inf inf 268435456 inf"), "a group around it has only 268.4 MB"),
    ],
)
def test_a_limit_of_systemd_that_is_not_in_force_is_not_pretended(system, systemd_run, script, text):
    systemd_run(script)
    assert limited(512, *system(2)).problem == f"systemd-run gives no memory limit here: {text}"


def test_a_group_of_ours_that_limits_nothing_is_not_pretended(system, monkeypatch):
    monkeypatch.setattr(limits, "END_S", 0)
    own, groups = system(1)
    found = limited(512, own, groups)
    assert found.problem == f"a group in {groups / 'memory' / 'box'} gives no memory limit: it is not seen to be in force"


def test_a_group_that_takes_none_below_it_is_said_with_what_to_do(system, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(limits.scratch, "make", denied)
    own, groups = system(1)
    why = "Permission denied; run this as root, or in a container, limit the container instead"
    assert limited(512, own, groups).problem == f"no group can be made in {groups / 'memory' / 'box'}: {why}"


def test_without_control_groups_that_limit_memory_there_is_no_limit_and_what_to_do_is_said(system, tmp_path):
    own, groups = system(2)
    (groups / "cgroup.controllers").write_text("cpu pids\n")
    problem = limited(512, own, groups).problem
    assert problem == limited(512, tmp_path / "none", tmp_path / "none").problem
    assert "control groups do not limit memory; where the kernel has that off, as on a Raspberry Pi, `cgroup_enable=memory" in problem
    assert problem.endswith("; in a container, limit the container instead")


def test_a_group_that_is_not_to_be_seen_takes_none(system):
    own, groups = system(1)
    assert "is not to be seen here" in limited(512, own, Path(groups, "elsewhere")).problem
