"""One schedule: server, devices and broker driven by one loop, in virtual time, while faults befall them.

What is said is delivered at once, unless a fault delays it; when nothing follows at once, time passes to what is due next.
"""

from __future__ import annotations

import heapq
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from lwfed import disk
from lwfed.config import RunConfig
from lwfed.seeds import derive
from lwfed.tools.faults.disk import Disk
from lwfed.tools.faults.judge import Judge
from lwfed.tools.faults.parties import DeviceParty, Party, ServerParty
from lwfed.tools.faults.schedule import SERVER, Anew, BrokerCrash, Cut, Fail, Fault, Kill, Leave, Schedule, Stall, Weather
from lwfed.transport.memory import Faults, MemoryBroker
from lwfed.wire.topics import Topics

MIN_STEP_S = 1e-3
SETTLE_S = 300.0  # after the run, for devices to learn of it
MAX_STEPS = 200_000  # of time, in one schedule: more are an endless loop
ROUND_S = 100.0  # beside its deadlines: training, and being sent tasks anew
PATIENCE = 4  # deadlines that a round may take after all faults: an agreement on who is there takes some

Note = Callable[[float, str, str], None]  # (time, who, what)


@dataclass(frozen=True)
class Outcome:
    seed: int
    violations: tuple[str, ...]
    faults: Counter[str]
    rounds: int
    virtual_s: float


class World:
    def __init__(self, schedule: Schedule, base: RunConfig, folder: Path, note: Note | None) -> None:
        self.now = 0.0
        self.config = schedule.config(base)
        self.topics = Topics(self.config.run.fleet)
        self.random = Random(derive(schedule.seed, "world"))
        self.disk = Disk()
        self.broker = MemoryBroker(log_length=0, clock=lambda: self.now)
        self._schedule, self._note, self._folder = schedule, note, folder
        self._faults: Counter[str] = Counter()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []  # a heap
        self._appointments = 0
        self._judge = Judge(self.topics)
        self._server = ServerParty(self, folder / "server")
        self._devices = [DeviceParty(number, self, folder / f"device-{number}") for number in range(schedule.devices)]
        self._server_starts = 0  # that the judge has seen
        self._is_calm = False

    def run(self) -> Outcome:
        self.later(0.0, self._server.start)
        for device in self._devices:
            self.later(self.random.uniform(0.0, 10.0), device.start)
        for fault in self._schedule.faults:
            self.later(fault.at_s, lambda fault=fault: self._befall(fault))  # type: ignore[misc]
        self.later(self._schedule.calm_s, self._calm)
        cuts_power = any(isinstance(fault, Kill) and fault.power for fault in self._schedule.faults)
        try:
            with disk.instead(self.disk.sync if cuts_power else lambda path: None):
                self._go_on()
        except Exception as error:
            self.note("fault", "".join(traceback.format_exception(error)))
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._judge.blame(f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {self._anywhere(str(error))}")
        if self._server.up:
            self._server.die()
        return Outcome(self._schedule.seed, tuple(self._judge.violations), self._faults, self._judge.rounds, self.now)

    # What parties see

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        self._appointments += 1
        heapq.heappush(self._agenda, (self.now + seconds, self._appointments, action))

    def note(self, who: str, text: str) -> None:
        if self._note is not None:
            self._note(self.now, who, self._anywhere(text))

    def published(self, who: str, topic: str, payload: bytes) -> None:
        if self._note is not None:
            self._note(self.now, who, f"> {topic.partition('/')[2]}  {_excerpt(topic, payload)}")
        if who == self._server.name:
            self._judge.published(self._server.course, topic, payload)
        else:
            self._judge.said(topic, payload)

    def _anywhere(self, text: str) -> str:
        """Without the folder, which is another one each time."""
        return text.replace(str(self._folder), ".")

    # Time

    def _go_on(self) -> None:
        """Until all is done, or it takes longer than it may."""
        rounds = sum(self.config.round_counts)
        limit_s = self._schedule.calm_s + rounds * (PATIENCE * self.config.rounds.deadline_s + ROUND_S)
        over_s: float | None = None
        for _ in range(MAX_STEPS):
            self._settle()
            if over_s is None and self._server.finished:
                over_s = self.now
                self._calm()
            if over_s is not None and (self.now > over_s + SETTLE_S or not any(device.owes for device in self._devices)):
                self._end()
                return
            if over_s is None and self.now > limit_s:
                self._judge.blame(f"the run has not ended {self.now - self._schedule.calm_s:.0f} s after the last fault")
                return
            self._pass_time()
        self._judge.blame(f"{MAX_STEPS} steps lead to {self.now:.0f} s only")

    def _settle(self) -> None:
        """Everything that needs no time."""
        while self.broker.pump() + self._server.hear():
            self._look()
        self._look()

    def _look(self) -> None:
        if self._server.up:
            if self._server.starts != self._server_starts:
                self._server_starts = self._server.starts
                self._judge.begun(self._server.course)
            self._judge.look(self._server.course)

    def _pass_time(self) -> None:
        """To what is due next, and do it."""
        parties: list[Party] = [self._server, *self._devices]
        due = {party: when for party in parties if (when := party.next_wakeup()) is not None}
        others = [self._agenda[0][0]] if self._agenda else []
        if (delivery := self.broker.next_delivery) is not None:
            others.append(delivery)
        now = min([*due.values(), *others], default=self.now + SETTLE_S)
        self.now = now if now > self.now else self.now + MIN_STEP_S
        while self._agenda and self._agenda[0][0] <= self.now:
            heapq.heappop(self._agenda)[2]()
        for party, when in due.items():
            if when <= self.now:
                party.poll()

    def _end(self) -> None:
        for device in self._devices:
            if owed := device.owes:
                self._judge.blame(f"the run is over, and the journal of {device.name} still holds {owed}")
        self._judge.end(self._server.course, self._folder / "reference")

    # Faults

    def _befall(self, fault: Fault) -> None:
        match fault:
            case _ if self._is_calm:
                pass
            case Weather():
                self.note("weather", f"until {fault.ends_s:.1f} s: {fault}")
                self.broker.faults = _Counted(fault, self.random.randrange(2**31), self._faults)
                self.later(fault.ends_s - self.now, lambda: self._clear_up(fault))
            case BrokerCrash(_, for_s, persistent):
                self._count(f"broker {'restart' if persistent else 'loss'}")
                self.note("broker", f"dies for {for_s:.1f} s{'' if persistent else ', and forgets everything'}")
                self.broker.stop(persistent)
                self.later(for_s, self.broker.start)
            case Fail(_, party, kinds):
                self._count("worker failure")
                self._party(party).fails.extend(kinds)
            case Anew():
                self._begin_anew(fault)
            case _ if self._party(fault.party).up:
                self._befall_party(fault, self._party(fault.party))

    def _begin_anew(self, fault: Anew) -> None:
        self._count("run begun anew")
        self.note("server", f"is ended, its state deleted, and started for another run in {fault.for_s:.1f} s")
        self._server.begin_anew()
        run = self.config.run.model_copy(update={"seed": fault.seed})
        self.config = self.config.model_copy(update={"run": run})
        self._judge.forget()
        self.later(fault.for_s, self._server.start)

    def _befall_party(self, fault: Cut | Stall | Kill | Leave, party: Party) -> None:
        client = party.client_id
        match fault:
            case Cut(_, _, for_s, will):
                self._count("cut")
                self.note(party.name, f"loses its connection for {for_s:.1f} s{'' if will else ', without its will'}")
                self.broker.cut(client, reconnect=False, will=will)
                self.later(for_s, lambda: self.broker.restore(client))
            case Stall(_, _, for_s, half_open):
                self._count("half-open link" if half_open else "stall")
                self.note(
                    party.name, f"is heard and hears nothing for {for_s:.1f} s{', and then loses its connection' if half_open else ''}"
                )
                self.broker.stall(client)
                self.later(for_s, lambda: self._end_stall(party, client, half_open))
            case Kill():
                self._count(f"{'server' if fault.party == SERVER else 'device'} kill{', disk lost' if fault.disk else ''}")
                party.kill(fault)
            case Leave(_, _, for_s):
                self._count("leave")
                assert isinstance(party, DeviceParty)
                party.leave()
                self.later(for_s, party.start)

    def _end_stall(self, party: Party, client: str, half_open: bool) -> None:
        if party.up and party.client_id == client:
            if half_open:
                self.broker.cut(client)
            else:
                self.broker.resume(client)

    def _clear_up(self, weather: Weather) -> None:
        if isinstance(self.broker.faults, _Counted) and self.broker.faults.weather is weather:
            self.broker.faults = Faults()

    def _calm(self) -> None:
        """All faults are over, and everything is started that is not; when their time is, or the run is over before."""
        if self._is_calm:
            return
        self._is_calm = True
        self.note("weather", "from now on everything works")
        self.broker.faults = Faults()
        self.broker.start()
        for party in (self._server, *self._devices):
            party.spare()
            party.fails.clear()
        self._server.start()
        for device in self._devices:
            device.mend()
        for party in (self._server, *self._devices):
            self._end_stall(party, party.client_id, half_open=False)
            self.broker.restore(party.client_id)

    def _count(self, kind: str) -> None:
        self._faults[kind] += 1

    def _party(self, number: int) -> Party:
        return self._server if number == SERVER else self._devices[number]


class _Counted(Faults):
    """The faults of a weather, counting the messages that they befall."""

    def __init__(self, weather: Weather, seed: int, counts: Counter[str]) -> None:
        super().__init__(seed, weather.drop, weather.duplicate, weather.reorder, weather.delay_s)
        self.weather = weather
        self._counts = counts

    def copies(self) -> int:
        copies = super().copies()
        if copies != 1:
            self._counts["message doubled" if copies else "message dropped"] += 1
        return copies

    def overtakes(self) -> bool:
        overtakes = super().overtakes()
        self._counts["message reordered"] += overtakes
        return overtakes

    def delay_s(self) -> float:
        delay_s = super().delay_s()
        self._counts["message delayed"] += delay_s > 0
        return delay_s


def _excerpt(topic: str, payload: bytes) -> str:
    return payload[:160].decode() if payload[:1] == b"{" else f"{len(payload)} bytes"
