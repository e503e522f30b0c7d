"""Who the devices are, and whom to remind of its task. No clock and no socket.

A device is admitted by its first hello and keeps its participant number for ever. Its retained state says whether it is
there; a last will that comes late, after the goodbye or of an earlier start, says nothing.

Of its starts the one with the highest number is believed, unless the device's state was copied or put back. So any other one
is challenged with the nonce of that, and believed when it answers: it is there after that one was heard. Whoever answers after
it was displaced by an answer was there before and after that: these are two agents, and nothing else looks like them, neither
starts nor messages that are late, doubled or out of order.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lwfed.cloud_server.store import Store
from lwfed.config.schema import MAX_DEVICES
from lwfed.wire.commands import Command, Send
from lwfed.wire.messages import DeviceState, Hello, Start, State, Task, encode
from lwfed.wire.records import Nonce
from lwfed.wire.topics import Topics

REMIND_S = 15.0  # after a task that nothing was heard of
UNANSWERED = 8  # tasks in a row: two minutes without a word. A broker that was down with a device knows nothing of its end
DISPLACED = 8  # starts of a device: more copies of it than these may go unnoticed
SILENCE_S = 60.0  # after the last sign of work on it: a slow device decodes images, or makes its first step


@dataclass
class Member:
    id: str
    participant: int
    hello: Hello
    start: Start  # the one that is believed
    state: DeviceState | None = None  # None: not seen since the server started
    displaced: deque[Nonce] = field(default_factory=lambda: deque(maxlen=DISPLACED))  # starts, by others that answered a challenge

    @property
    def there(self) -> bool:
        return self.state in ("ready", "training")

    def believes(self, start: Start) -> bool:
        """Whether it is the one that is believed, or comes after it."""
        return start == self.start or (start.boot > self.start.boot and start.nonce not in self.displaced)

    def displace(self, start: Start) -> bool:
        """Believe `start`, which has answered a challenge; whether two agents are there."""
        if self.start.nonce not in self.displaced:
            self.displaced.append(self.start.nonce)
        self.start = start
        return start.nonce in self.displaced


class Fleet:
    def __init__(self, topics: Topics, store: Store, min_images: int, unfit: Callable[[], Mapping[int, str]]) -> None:
        self.members: dict[str, Member] = {}
        self._topics = topics
        self._store = store
        self._min_images, self._unfit = min_images, unfit
        self._round: tuple[str, int, int] | None = None  # run, stage and round that reminders are about
        self._asked: dict[int, float] = {}  # participant -> when its task was last sent
        self.reminded = False  # the last tasks included some that had been sent before
        self._heard: dict[int, float] = {}  # participant -> when it last showed that it works on its task
        self._unanswered: Counter[str] = Counter()  # device -> tasks since it was last heard of
        self._owing: Sequence[int] = ()
        self._next: float | None = None  # no task of `_owing` is due before; None: to be found anew
        self._blocked = False  # tasks are due for which there was no room
        for device in store.devices():
            self.members[device.id] = Member(device.id, device.participant, device.hello, device.hello.start)

    def objection(self, member: Member) -> str:
        """Why it is not asked to train; empty when it may be. A device that cannot count its images beforehand says 0."""
        if reason := self._unfit().get(member.participant):
            return reason
        if 0 < member.hello.images < self._min_images:
            return f"it has {member.hello.images} images, and data.min_images is {self._min_images}"
        return ""

    def greet(self, device: str, hello: Hello) -> Member | None:
        """The member, admitted now if it is new; None when there is no room for another one."""
        if device not in self.members and len(self.members) >= MAX_DEVICES:
            return None
        participant, _ = self._store.admit(device, hello)
        member = self.members.setdefault(device, Member(device, participant, hello, hello.start))
        member.hello = hello
        member.start = hello.start
        if not member.there:
            member.state = "ready"
        self.remind(participant)
        return member

    def note(self, device: str, state: State, now: float) -> Member | None:
        """The member whose state this is; None when it is unknown or the message belongs to the past."""
        member = self.members.get(device)
        if member is None or not member.believes(state.start):
            return None
        if (state.start, member.state, state.state) == (member.start, "stopped", "lost"):
            return None  # a goodbye is the last word of a start
        if not member.there:
            self._next = None
        member.start = state.start
        member.state = state.state
        if state.state == "training" and member.participant in self._asked:
            self.works(member.participant, now)
        return member

    def heard(self, device: str) -> None:
        """It has said something, whatever it is."""
        self._unanswered.pop(device, None)

    def take_silent(self) -> list[Member]:
        """Those that do not answer; they are lost now, until they say that they are there."""
        silent = [self.members[device] for device, count in self._unanswered.items() if count >= UNANSWERED]
        for member in silent:
            member.state = "lost"
            self.heard(member.id)
            self._next = None
        return silent

    def works(self, participant: int, now: float) -> None:
        """It works on its task of this round: no reminder is needed for a while."""
        self._heard[participant] = now

    def remind(self, participant: int | None = None) -> None:
        """Send its task again at the next opportunity; or everybody's, after our own connection was lost."""
        for one in [participant] if participant is not None else list(self._asked):
            self._asked.pop(one, None)
            self._heard.pop(one, None)
        self._next = None

    def tasks(self, run: str, stage: int, round: int, owing: Sequence[int], now: float, room: int) -> list[Command]:
        """At most `room` of the tasks that are due among those who still owe an update."""
        if (run, stage, round) != self._round:
            self._round = run, stage, round
            self._asked.clear()
            self._heard.clear()
            self._next = None
        commands: list[Command] = []
        self.reminded = False
        self._blocked = now >= self._next_due(owing) and room <= 0
        if self._blocked or now < self._next_due(owing):
            return commands
        for member in self._askable(owing):
            if self._due(member.participant) <= now:
                self._blocked = len(commands) == room
                if self._blocked:
                    break
                self.reminded |= member.participant in self._asked
                self._asked[member.participant] = now
                self._unanswered[member.id] += 1
                task = Task(run=run, stage=stage, round=round, participant=member.participant)
                commands.append(Send(self._topics.to_device(member.id, "task"), encode(task)))
        self._next = None
        return commands

    def next_wakeup(self, owing: Sequence[int]) -> float | None:
        """None also while tasks wait for room: then the transport's next event is the time to ask for them."""
        if self._blocked:
            return None
        when = self._next_due(owing)
        return None if when == float("inf") else when

    def _next_due(self, owing: Sequence[int]) -> float:
        """Asked after every message of a thousand devices: found anew only when it may have come nearer, so it may be early."""
        if self._next is None or owing != self._owing:
            self._owing = owing
            self._next = min((self._due(one.participant) for one in self._askable(owing)), default=float("inf"))
        return self._next

    def _askable(self, owing: Iterable[int]) -> list[Member]:
        wanted = set(owing)
        return [one for one in self.members.values() if one.participant in wanted and one.there and not self.objection(one)]

    def _due(self, participant: int) -> float:
        never = float("-inf")
        return max(self._asked.get(participant, never) + REMIND_S, self._heard.get(participant, never) + SILENCE_S)
