import pytest

from lwfed.control_groups import OomKills


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


def test_a_group_that_is_gone_at_the_end_does_not_count(system):
    events = system / "cgroup" / "box" / "agent" / "memory.events"
    events.write_text("oom_kill 1\n")
    kills = OomKills(system / "proc", system / "cgroup")
    events.unlink()
    assert kills.happened() is False
