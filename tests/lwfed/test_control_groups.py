import math

import pytest

from lwfed.control_groups import VERSION_1, VERSION_2, OomKills, limiting, limits_in_force, own_group


@pytest.fixture
def system(tmp_path):
    """Folders proc and cgroup of a process in group /box/agent, whose system says nothing yet."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    for folder in (groups, groups / "memory"):
        (folder / "box" / "agent").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("4:memory:/box/agent\n0::/box/agent\n")
    return tmp_path


@pytest.mark.parametrize(
    "file",
    ["proc/vmstat", "cgroup/box/agent/memory.events", "cgroup/box/memory.events", "cgroup/memory/box/agent/memory.oom_control"],
)
def test_memory_ran_out_where_any_count_rises(system, file):
    counts = system / file
    counts.write_text("oom 9\noom_kill 2\noom_group_kill 0\n")
    (system / "cgroup" / "memory.events").write_text("oom_kill 0\n")
    kills = OomKills(system / "proc", system / "cgroup")
    assert kills.happened() is False
    counts.write_text("oom 10\noom_kill 2\noom_group_kill 1\n")
    assert kills.happened() is False, "that counts something else"
    counts.write_text("oom 10\noom_kill 3\noom_group_kill 1\n")
    assert kills.happened() is True
    assert OomKills(system / "proc", system / "cgroup").happened() is False, "since then"


def test_groups_of_others_do_not_count(system):
    (system / "proc" / "vmstat").write_text("oom_kill 0\n")
    (system / "cgroup" / "other").mkdir()
    other = system / "cgroup" / "other" / "memory.events"
    other.write_text("oom_kill 0\n")
    kills = OomKills(system / "proc", system / "cgroup")
    other.write_text("oom_kill 5\n")
    assert kills.happened() is False


def test_a_system_that_does_not_say_is_not_asked_twice(system):
    (system / "proc" / "vmstat").write_text("pgfault 7\n")  # a kernel before 4.13
    assert OomKills(system / "proc", system / "cgroup").happened() is None
    assert OomKills(system / "nothing", system / "nothing").happened() is None


def test_a_place_whose_name_is_not_in_utf_8_disturbs_nobody(system):
    mounts = f"36 25 0:31 / {system}/cgroup rw - cgroup2 none rw\n37 25 0:32 / /media/M\xe9moire rw - vfat /dev/sda1 rw\n"
    (system / "proc" / "self" / "mountinfo").write_bytes(mounts.encode("latin-1"))
    events = system / "cgroup" / "box" / "agent" / "memory.events"
    events.write_text("oom_kill 1\n")
    kills = OomKills(system / "proc", system / "cgroup")
    events.write_text("oom_kill 2\n")
    assert kills.happened() is True


def test_a_group_that_is_gone_at_the_end_does_not_count(system):
    events = system / "cgroup" / "box" / "agent" / "memory.events"
    events.write_text("oom_kill 1\n")
    kills = OomKills(system / "proc", system / "cgroup")
    events.unlink()
    assert kills.happened() is False


@pytest.mark.parametrize(
    ("named", "controllers", "version"),
    [
        ("4:memory:/box\n0::/box\n", None, VERSION_1),
        ("3:hugetlb,memory:/box\n", None, VERSION_1),
        ("4:memory:/box\n0::/box\n", "cpu", VERSION_1),
        ("0::/box\n", "cpu memory pids", VERSION_2),
        ("0::/box\n", "cpu pids", None),
        ("1:name=systemd:/box\n", None, None),
    ],
)
def test_memory_is_limited_by_the_version_that_has_its_controller(system, named, controllers, version):
    own, groups = system / "proc" / "self" / "cgroup", system / "cgroup"
    own.write_text(named)
    if controllers:
        (groups / "cgroup.controllers").write_text(f"{controllers}\n")
    assert limiting(own, groups) is version


def test_all_limits_above_a_process_are_in_force_its_own_first(system):
    own, groups = system / "proc" / "self" / "cgroup", system / "cgroup"
    own.write_text("0::/box/agent\n")
    assert list(limits_in_force(own, groups)) == []
    (groups / "cgroup.controllers").write_text("memory\n")
    for folder, limit, throttled in (("box/agent", "900", "max"), ("box", "max", "700")):
        (groups / folder / "memory.max").write_text(f"{limit}\n")
        (groups / folder / "memory.high").write_text(f"{throttled}\n")
    assert list(limits_in_force(own, groups)) == [900, math.inf, math.inf, 700]
    own.write_text("4:memory:/box/agent\n0::/box/agent\n")
    (groups / "memory" / "box" / "memory.limit_in_bytes").write_text("800\n")
    assert list(limits_in_force(own, groups)) == [800]


MOUNTS = """\
31 24 0:27 / {groups} ro - tmpfs tmpfs rw
35 31 0:32 / {groups}/memory rw - cgroup cgroup rw,memory
36 31 0:32 /docker/one {groups}/memory rw - cgroup cgroup rw,memory
"""


@pytest.mark.parametrize(
    ("named", "found"), [("/docker/one", "."), ("/docker/one/box/agent", "box/agent"), ("/box/gone", "box"), ("/x", ".")]
)
def test_in_a_container_that_sees_its_own_groups_only_they_are_found(system, named, found):
    own, groups = system / "proc" / "self" / "cgroup", system / "cgroup"
    own.write_text(f"4:memory:{named}\n")
    own.with_name("mountinfo").write_text(MOUNTS.format(groups=groups))
    assert own_group(VERSION_1, own, groups) == groups / "memory" / found
