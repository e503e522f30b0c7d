"""Kills that hit what they are meant for.

From when its moment may have come the victim is stopped (SIGSTOP) again and again. While it stands still, what is on disk and what was
said tell where it is in the run: there it is killed, anywhere else it goes on. So no moment is guessed by time, and a kill that was made
is one that has hit.
"""

import os
import sqlite3
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, takewhile
from pathlib import Path

import psutil
import pytest

from lwfed.cloud_server.rounds import State

STEP_S = 0.002  # that the victim runs between two looks
STEPS = 50  # that its worker goes on without it
LOOKS = 150_000  # at least 300 s, an upper bound for a loaded machine: a run that gets nowhere must not hang
COURSE = ("preparing", "measuring", "waiting", "training", "aggregating", "calibrating", "evaluating", "finished")
PHASES = {  # in the order of a round -> where the server is meanwhile
    "preparing": "preparing",
    "prepared": "preparing",  # the worker has written something that the server has not taken over
    "measuring": "measuring",  # what there is to compare with, before any training
    "fetching": "training",  # chunks are on their way down, some are there
    "starting": "training",  # the agent's worker runs, and has not planned yet
    "training": "training",  # an epoch is done
    "sending": "training",  # chunks are on their way up, some are there
    "aggregating": "aggregating",
    "calibrating": "calibrating",
    "calibrated": "calibrating",  # as prepared
    "evaluating": "evaluating",
    "exporting": "finished",  # and the encoder was not announced
}
BEFORE_DEVICES = ("preparing", "prepared", "measuring")  # in stage 1


@dataclass(frozen=True)
class Moment:
    party: str  # agent | agent's worker | server | server's worker | broker
    phase: str
    place: tuple[int, int]  # stage, round
    device: int = 0  # of the two, whose agent or worker it is
    look: int = 1  # the one that kills, of those that find the victim there
    epoch: int = 1  # done, of training

    @property
    def order(self):
        return self.place, list(PHASES).index(self.phase)

    @property
    def early(self):
        return self.place == (1, 1) and self.phase in BEFORE_DEVICES


class Watch:
    """Where the run below `root` is; `server` and `devices` are its programs, replaced by whoever starts them anew."""

    def __init__(self, root, server):
        self.server, self.devices = server, []
        self._root = root

    def strike(self, moment):
        """SIGKILL at that moment. Fails when the run, or the server, has passed it."""
        if (moment.party, moment.phase) == ("server's worker", "aggregating"):
            self._strike_as_it_merges(moment)
            return
        found, seen, victim = 0, {}, None
        for _ in self._looks(moment):
            time.sleep(STEP_S)
            if self._is_far_from(moment):
                continue
            with suppress(psutil.NoSuchProcess), ExitStack() as standing:
                if moment.party == "server's worker":  # what a warm one does is done in a moment: the server must not take it
                    standing.enter_context(_stopped(psutil.Process(self.server.process.pid)))
                if victim is None or not victim.is_running():
                    victim = self._victim(moment)
                standing.enter_context(_stopped(victim))
                found += self._holds(moment, self._state(), seen)
                if found == moment.look:
                    victim.kill()
                    return
            self._fail_if_passed(moment)

    def _strike_as_it_merges(self, moment):
        """A warm worker is through in milliseconds: it stands still until its job has begun, and goes on from there alone."""
        idle, looks = None, self._looks(moment)
        for _ in looks:
            time.sleep(STEP_S)
            self._fail_if_passed(moment)
            if self._is_at(moment, self._state(), "training"):
                idle = self._work_begun()
            if idle is None:
                continue
            with suppress(psutil.NoSuchProcess), _stopped(self._victim(moment)) as worker:
                server = psutil.Process(self.server.process.pid)
                for _ in takewhile(lambda _: worker.is_running(), looks):
                    time.sleep(STEP_S)  # in which the server may close the round and begin the job
                    with _stopped(server):
                        begun = self._is_at(moment, self._state(), "aggregating") and self._work_begun() != idle
                        if begun and self._merges(worker, moment, looks):
                            return

    def _looks(self, moment):
        """As many as there may be until that moment; fails with the last of them, or when a program ends."""
        for _ in range(LOOKS):
            for program in (self.server, *self.devices):
                if program.process.poll() is not None:
                    pytest.fail(f"a program ended before {moment}:\n{program.transcript()}")
            yield
        pytest.fail(f"{moment} has not come after {LOOKS} looks: the run is at {self._place()}")

    def _fail_if_passed(self, moment):
        if self._is_over(moment):
            pytest.fail(f"{moment} has passed unseen: the run is at {self._place()}")

    def _place(self):
        state = self._state()
        return f"{state.stage}, {state.round}, {state.phase}" if state else "its beginning"

    def _is_over(self, moment):
        state = self._state()
        return state is not None and _passed(state, moment)

    def _is_at(self, moment, state, *phases):
        """Whether the round is that of `moment`, and in one of those phases."""
        return state is not None and (state.stage, state.round) == moment.place and _phase(state) in phases

    def _is_far_from(self, moment):
        """Devices train in an earlier round, or have not begun, or not got there: nobody need be stopped."""
        state = self._state()
        if state is None or (state.phase in ("waiting", "training") and (state.stage, state.round) < moment.place):
            return True
        return self._is_at(moment, state, "training") and not self._has_begun(moment)

    def _has_begun(self, moment):
        """Whether what is waited for may have come, within its round."""
        match moment.phase:
            case "training":
                return self._has_trained(moment)
            case "sending" if moment.party == "agent":
                return self._fact(moment, "update")
            case "sending":
                return any((self._root / "server" / "updates").glob("parts/*.part"))
        return True

    def _victim(self, moment):
        match moment.party:
            case "server":
                return psutil.Process(self.server.process.pid)
            case "agent":
                return psutil.Process(self.devices[moment.device].process.pid)
            case "server's worker":
                return _child(self.server, "lwfed.cloud_server.worker")
            case "agent's worker":
                return _child(self.devices[moment.device], "lwfed.edge_agent.worker")
            case "broker":
                return _child(self.server, "mosquitto", "lwfed.cloud_server.embedded")

    def _holds(self, moment, state, seen):
        """Whether the victim, which stands still, is where it is to be killed; `seen` remembers what looks before have seen."""
        if not self._is_at(moment, state, PHASES[moment.phase]):
            return False
        match moment.phase:
            case "prepared" | "calibrated":
                return self._worker_writes()
            case "fetching":
                numbers = [moment.device] if moment.party == "agent" else range(len(self.devices))
                return any(_arriving(self._home(number) / "model", seen) for number in numbers)
            case "starting":
                return self._fact(moment, "task") and not self._fact(moment, f"execution demo {state.stage}")
            case "training":
                return self._has_trained(moment) and self._fact(moment, "task")
            case "sending" if moment.party == "agent":
                return self._fact(moment, "update")
            case "sending":
                return _arriving(self._root / "server" / "updates", seen)
            case "exporting":
                return not self.server.has_said("finished")
        return True

    def _has_trained(self, moment):
        stage, round = moment.place
        return self.devices[moment.device].has_said("training", stage=stage, round=round, epoch=moment.epoch)

    def _worker_writes(self):
        """Whether there is something of the server's worker, which goes on for a while as the server stands still."""
        for _ in range(STEPS):
            if any((self._root / "server" / "work").glob("*")):
                return True
            time.sleep(STEP_S)
        return False

    def _merges(self, worker, moment, looks):
        """Kill the server's worker where it reads updates, of which the last says nothing meanwhile; False where it is not there yet."""
        query = "SELECT blob FROM contributions WHERE stage = ? AND round = ? ORDER BY participant DESC"
        last = self._root / "server" / "updates" / _read(self._root / "server" / "run.sqlite", query, *moment.place)
        with _silent(last):
            for _ in islice(looks, STEPS):
                _go_on(worker, STEP_S)
                if (self._root / "server" / "work" / "unpacked").exists():
                    worker.kill()
                    return True
        return False

    def _work_begun(self):
        """When the present or last job of the server's worker did, for its folder is made anew for each; 0 in between."""
        with suppress(FileNotFoundError):
            return (self._root / "server" / "work").stat().st_ctime_ns
        return 0

    def _home(self, number):
        return self._root / f"device-{number + 1}"

    def _fact(self, moment, key):
        """Whether the journal of the device has it."""
        return _read(self._home(moment.device) / "journal.sqlite", "SELECT value FROM facts WHERE key = ?", key) is not None

    def _state(self):
        """What is stored of the coordinator; None while there is nothing to be read."""
        text = _read(self._root / "server" / "run.sqlite", "SELECT state FROM runs")
        return None if text is None else _parsed(text)


@lru_cache(maxsize=1)
def _parsed(text):
    return State.from_json(text)


def _phase(state):
    """That of the coordinator, which evaluates before any training too."""
    return "measuring" if state.phase == "evaluating" and not state.trained else state.phase


def _passed(state, moment):
    return ((state.stage, state.round), COURSE.index(_phase(state))) > (moment.place, COURSE.index(PHASES[moment.phase]))


def _read(path, query, *parameters):
    with suppress(sqlite3.OperationalError):  # not there yet, or within a transaction that lets nobody look
        database = sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=0)
        try:
            row = database.execute(query, parameters).fetchone()
        finally:
            database.close()
        return row and row[0]
    return None


def _arriving(folder, seen):
    """Whether a part there has more bytes than when it was first seen, and is still no whole blob."""
    more = False
    for path in folder.glob("parts/*.part"):
        with suppress(FileNotFoundError):
            here = len(path.read_bytes().replace(b"\0", b""))
            more |= here > seen.setdefault(path, here)
    return more


def _child(program, *names):
    """The child of `program` that runs one of those modules or programs. Raises NoSuchProcess while there is none."""
    for child in psutil.Process(program.process.pid).children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            words = child.cmdline()
            if words and (Path(words[0]).name in names or (words[2:3] and words[2] in names)):
                return child
    raise psutil.NoSuchProcess(program.process.pid, msg=f"no {names} there")


@contextmanager
def _stopped(process):
    """It stands still within: SIGSTOP, and the end of whatever the kernel was doing for it. Raises NoSuchProcess for one that has ended."""
    try:
        _stop(process)
        yield process
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def _go_on(process, seconds):
    """One that stands still goes on for so long."""
    process.resume()
    time.sleep(seconds)
    _stop(process)


def _stop(process):
    process.suspend()
    while (status := process.status()) != psutil.STATUS_STOPPED:
        if status == psutil.STATUS_ZOMBIE:
            raise psutil.NoSuchProcess(process.pid)


@contextmanager
def _silent(path):
    """A pipe that nobody writes to stands in place of the file within: who opens it waits."""
    aside = path.with_suffix(".aside")
    path.rename(aside)
    os.mkfifo(path)
    try:
        yield
    finally:
        aside.replace(path)
