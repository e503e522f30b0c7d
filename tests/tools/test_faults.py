"""The fault simulator: that the machines withstand it, and that it notices when they do not."""

import gc
import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from lwfed import disk
from lwfed.child import END_KINDS
from lwfed.cloud_server import coordinator, course, merge
from lwfed.cloud_server.events import Restarted
from lwfed.cloud_server.reception import Reception
from lwfed.cloud_server.rounds import State
from lwfed.cloud_server.updates import Updates
from lwfed.config import load_config
from lwfed.edge_agent import work
from lwfed.edge_agent.journal import Journal
from lwfed.edge_agent.previous import Previous
from lwfed.edge_agent.work import Work
from lwfed.tools.cli import main
from lwfed.tools.faults.command import BASE, run_some
from lwfed.tools.faults.schedule import LONGEST_S, SERVER, Anew, Fail, Kill, Schedule, Weather, draw
from lwfed.tools.faults.store import MemoryStore
from lwfed.tools.faults.world import World
from lwfed.wire.upload import Upload

SCHEDULES = 400
MANY = 2000


def violated(seeds):
    return {outcome.seed: outcome.violations for outcome in run_some(seeds) if outcome.violations}


def test_nothing_is_lost_or_counted_twice_and_every_run_ends():
    outcomes = list(run_some(range(SCHEDULES)))
    assert {outcome.seed: outcome.violations for outcome in outcomes if outcome.violations} == {}
    assert min(outcome.rounds for outcome in outcomes) >= 2


@pytest.mark.slow
def test_nothing_is_lost_or_counted_twice_in_many_schedules():
    assert violated(range(SCHEDULES, SCHEDULES + MANY)) == {}


def test_a_schedule_is_the_same_whenever_it_is_played():
    def trace(seed):
        lines = []
        (outcome,) = run_some([seed], lambda *line: lines.append(line))
        return lines, outcome

    seed = next(seed for seed in range(100) if {Kill, Weather} <= {type(fault) for fault in draw(seed).faults})
    first = trace(seed)
    assert len(first[0]) > 100
    assert trace(seed) == first


def test_what_was_there_before_is_collected_again_afterwards():
    outcomes = run_some(range(2))
    frozen = [gc.get_freeze_count() for _ in outcomes]
    assert (min(frozen) > 0, gc.get_freeze_count()) == (True, 0)
    next(left := run_some(range(2)))
    left.close()
    assert gc.get_freeze_count() == 0


def test_schedules_are_of_all_kinds():
    drawn = [draw(seed) for seed in range(400)]
    kills = [fault for schedule in drawn for fault in schedule.faults if isinstance(fault, Kill)]
    assert {kill.point for kill in kills} == {"anywhere", "uncommitted", "unpublished"}
    assert {(kill.party == SERVER, kill.power, kill.disk) for kill in kills} >= {
        (True, False, False),
        (True, True, False),
        (False, True, True),
    }
    assert max(fault.drop for schedule in drawn for fault in schedule.faults if isinstance(fault, Weather)) == 0.3
    assert all(fault.at_s <= schedule.calm_s <= LONGEST_S for schedule in drawn for fault in schedule.faults)
    assert {schedule.devices for schedule in drawn} == {2, 3, 4, 5}
    rounds = [schedule.settings["stages"]["rounds_per_stage"] for schedule in drawn]
    assert {len(stages) for stages in rounds} == {2, 3}
    assert {max(stages) for stages in rounds} == {1, 2, 3}
    transfers = [schedule.settings["transfer"] for schedule in drawn]
    assert {(transfer["codec"], transfer["top_k"] < 1) for transfer in transfers} == {
        ("fp32", False),
        ("int8", False),
        ("int8", True),
        ("bf16", False),
        ("bf16", True),
    }
    kinds = {kind for schedule in drawn for fault in schedule.faults if isinstance(fault, Fail) for kind in fault.kinds}
    assert kinds == {*END_KINDS, "OutOfMemory", "Diverged", "DataError", "RuntimeError"}


# That it can fail: a machine is broken, and the schedules that show it are named and can be played again.


def acknowledging_before_recording(monkeypatch):
    """`done` is sent with what has arrived; it is recorded with the next message."""
    record, receive = Reception._on_update, Reception.receive
    owed = []

    def acknowledge(self, member, received, now):
        id = received.offer.contribution
        owed.append((self, member, received, now, self._inbox._checking[id]))
        return self._inbox.accept(id)

    def record_and_receive(self, topic, payload, now):
        while owed:
            reception, member, received, then, transfer = owed.pop()
            if reception is self:
                self._inbox._checking[received.offer.contribution] = transfer
                record(self, member, received, then)
        return receive(self, topic, payload, now)

    monkeypatch.setattr(Reception, "_on_update", acknowledge)
    monkeypatch.setattr(Reception, "receive", record_and_receive)


def counting_twice(monkeypatch):
    monkeypatch.setattr(merge, "Updates", lambda received, shares, *rest: Updates(received, [*shares, shares[0]], *rest))


def losing_updates_after_recording_them(monkeypatch):
    apply = course.Course.apply

    def and_lose(self, event, now, write=None):
        notices = apply(self, event, now, write)
        if self.state.contributed:
            self.spool.forget(())
        return notices

    monkeypatch.setattr(course.Course, "apply", and_lose)


def taking_no_answer_for_an_acknowledgement(monkeypatch):
    poll = Upload.poll

    def and_be_done(self, now, room, traffic):
        commands = poll(self, now, room, traffic)
        if self.state == "finishing":
            self.state = "done"
        return commands

    monkeypatch.setattr(Upload, "poll", and_be_done)


def forgetting_to_settle_the_journal(monkeypatch):
    monkeypatch.setattr(Journal, "settle", lambda self, accepted=None: None)


def renaming_what_was_not_synced(monkeypatch):
    monkeypatch.setattr(disk, "install", lambda temporary, path: (temporary.replace(path), disk.sync(path.parent)))


def not_syncing_the_folder_of_what_was_renamed(monkeypatch):
    monkeypatch.setattr(disk, "install", lambda temporary, path: (disk.sync(temporary), temporary.replace(path)))


def forgetting_what_encoding_lost(monkeypatch):
    monkeypatch.setattr(Previous, "before", property(lambda self: None))


BROKEN = {
    acknowledging_before_recording: "which is not in the store",
    counting_twice: "not what the contributions make",
    losing_updates_after_recording_them: "recorded and not on disk",
    taking_no_answer_for_an_acknowledgement: "the run has not ended",
    forgetting_to_settle_the_journal: "journal of device",
    renaming_what_was_not_synced: "deleted or damaged",
    not_syncing_the_folder_of_what_was_renamed: "deleted or damaged",
    forgetting_what_encoding_lost: "not those that its devices make",
}


def play(folder, faults, stages, rounds):
    """Two devices, with both of which each round begins."""
    settings = {"model": {"depth": 2}, "stages": {"rounds_per_stage": stages}, "rounds": {"min_devices": 2, **rounds}}
    folder.mkdir()
    return World(Schedule(1, 2, settings, faults, calm_s=200.0), load_config("base", BASE), folder, None).run()


def doubled(kind, *more, delay_s=0.0):
    """What `play` takes for two rounds that need both devices, whose messages all arrive twice; the first job of one fails."""
    weather = Weather(at_s=0.0, ends_s=200.0, drop=0.0, duplicate=1.0, reorder=0.0, delay_s=delay_s)
    return (weather, Fail(0.0, 0, (kind,)), *more), (1, 1), {"quorum": 1.0, "deadline_s": 300.0}


def test_a_failure_that_arrives_twice_counts_once_and_where_it_does_not_that_is_noticed(tmp_path, monkeypatch):
    played = doubled("out of memory")
    outcome = play(tmp_path / "mended", *played)
    assert (outcome.violations, outcome.rounds) == ((), 2)
    assert outcome.virtual_s < 300, "no round lasts until its deadline"
    monkeypatch.setattr(State, "knows_failure", lambda self, participant, attempt: False)
    broken = play(tmp_path / "broken", *played)
    assert broken.violations == ("stage 1, round 1, training: of participant 0 2 failures count, not 1",)


def test_a_failure_that_arrives_again_after_a_restart_counts_once_and_where_it_does_not_that_is_noticed(tmp_path, monkeypatch):
    kill, restarted = Kill(30.0, 0, 0.5, "anywhere", skip=0, power=False, disk=False), coordinator.ALWAYS[Restarted]
    played = doubled("Diverged", kill, delay_s=8.0)

    def forgetting(rules, state, event, now):
        return restarted(rules, replace(state, attempts={}), event, now)

    assert play(tmp_path / "mended", *played).violations == ()
    monkeypatch.setitem(coordinator.ALWAYS, Restarted, forgetting)
    broken = play(tmp_path / "broken", *played)
    assert broken.violations == ("stage 1, round 1, training: of participant 1 2 failures count, not 1",)


def test_kills_of_one_task_are_not_those_of_the_next_and_where_they_are_that_is_noticed(tmp_path, monkeypatch):
    """Two in each of two rounds, which go on without the device."""
    played = (Fail(0.0, 0, ("killed",) * 4),), (3, 1), {"quorum": 0.5, "deadline_s": 30.0}
    assign = Work.assign

    def and_remember(self, task):
        killed = self._killed
        effects = assign(self, task)
        self._killed = killed
        return effects

    assert play(tmp_path / "mended", *played).violations == ()
    monkeypatch.setattr(Work, "assign", and_remember)
    (violation,) = play(tmp_path / "broken", *played).violations
    assert "a device whose memory never ran out plans" in violation


def test_a_kill_is_not_taken_for_want_of_memory_and_where_it_is_that_is_noticed(tmp_path, monkeypatch):
    played = (Fail(0.0, 0, ("killed",)),), (1, 1), {"quorum": 1.0, "deadline_s": 300.0}
    assert play(tmp_path / "mended", *played).violations == ()
    monkeypatch.setattr(work, "MAX_KILLED", 0)
    monkeypatch.setitem(work.FAIL_CODES, "killed", "memory")
    (violation,) = play(tmp_path / "broken", *played).violations
    assert "a device whose memory never ran out plans" in violation


def test_another_run_of_the_name_takes_no_update_of_the_first_and_where_it_does_that_is_noticed(tmp_path, monkeypatch):
    """Both devices train in its first round when the server begins anew."""
    played = (Anew(12.0, 0.5, seed=4711),), (2, 1), {"quorum": 1.0, "deadline_s": 300.0}
    begin = MemoryStore.begin
    assert play(tmp_path / "mended", *played).violations == ()
    monkeypatch.setattr(MemoryStore, "begin", lambda self, *asked: begin(self, *asked)._replace(id="demo"))
    (violation,) = play(tmp_path / "broken", *played).violations
    assert "kept of an earlier round, cannot be read" in violation  # what encoding lost in the first run


def cuts_power(seed):
    return SERVER in {fault.party for fault in draw(seed).faults if isinstance(fault, Kill) and fault.power}


@pytest.mark.parametrize("break_it", BROKEN)
def test_broken_machines_are_noticed_and_their_seeds_play_again(monkeypatch, break_it):
    break_it(monkeypatch)
    found = next((outcome for outcome in run_some(filter(cuts_power, range(160))) if outcome.violations), None)
    assert found is not None
    assert any(BROKEN[break_it] in text for text in found.violations)
    assert violated([found.seed]) == {found.seed: found.violations}


def test_the_summary_is_one_object_and_says_how_it_ended():
    done = CliRunner().invoke(main, ["simulate", "--faults", "3", "--seed", "5", "--json"])
    found = json.loads(done.output)
    assert (done.exit_code, found["schedules"], found["violations"], found["failing_seeds"]) == (0, 3, 0, [])
    assert found["rounds"] >= 6


def test_a_failing_seed_is_named_with_the_command_that_shows_it(monkeypatch):
    forgetting_to_settle_the_journal(monkeypatch)
    done = CliRunner().invoke(main, ["simulate", "--faults", "2", "--seed", "5"])
    assert done.exit_code == 1
    assert "lwfed simulate --faults 1 --seed 5" in done.output
    alone = CliRunner().invoke(main, ["simulate", "--faults", "1", "--seed", "5"])
    assert "from now on everything works" in alone.output
    assert "still holds an update" in alone.output


@pytest.mark.parametrize("words", [["demo"], ["demo", "--data", "digits", "--faults", "1"], ["--data", "digits"], ["--faults", "0"]])
def test_faults_and_training_are_not_simulated_together(words):
    assert CliRunner().invoke(main, ["simulate", *words]).exit_code == 2
