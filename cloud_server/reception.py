"""What devices say, checked and passed on to fleet, inbox, broadcast and course.

Nothing that a device sends may harm the run: what does not parse is ignored, what does not fit is refused
with a reason, and both are counted and said once in each round.
"""

from __future__ import annotations

from collections.abc import Callable

from lwfed.cloud_server.complaints import Complaints
from lwfed.cloud_server.course import Course, Write
from lwfed.cloud_server.events import Absent, CannotTrain, Contributed, Event, Present, RanShort, Refused, Restarted, Unfit
from lwfed.cloud_server.fleet import Fleet, Member
from lwfed.cloud_server.limits import Buckets
from lwfed.cloud_server.news import News
from lwfed.cloud_server.store import Contribution
from lwfed.errors import InvalidMessage, InvalidPayload, ProtocolMismatch
from lwfed.wire.broadcast import Broadcast
from lwfed.wire.commands import Command, Send
from lwfed.wire.inbox import Inbox, ReceivedUpdate
from lwfed.wire.messages import UP, Beat, Challenge, Fail, Fin, Got, Hello, Message, Need, Offer, RefuseCode, Start, State, decode, encode
from lwfed.wire.topics import FromDevice, Stray, Topics, UpdateChunk

Apply = Callable[[Event, float, Write | None], None]
STARTS_PER_S, STARTS_AT_ONCE = 0.5, 20  # of one agent: each is written to disk


class Reception:
    def __init__(self, topics: Topics, course: Course, fleet: Fleet, inbox: Inbox, broadcast: Broadcast, news: News, apply: Apply) -> None:
        self.complaints = Complaints(course.store, news, fleet.members)
        self._starts = Buckets(STARTS_PER_S, STARTS_AT_ONCE)
        self._topics, self._course, self._fleet = topics, course, fleet
        self.broadcast, self._inbox, self._news, self._apply = broadcast, inbox, news, apply

    def receive(self, topic: str, payload: bytes, now: float) -> list[Command]:
        """Take a message; what is to be answered."""
        match self._topics.parse(topic):
            case UpdateChunk() as chunk:
                return self._on_chunk(chunk, payload, now)
            case FromDevice(device, kind) if kind in UP:
                return self._on_message(device, kind, payload, now)
            case FromDevice(device) | Stray(device):
                self.complain(device, "topic", f"device {device} sent to a topic that means nothing, ignored: {topic}")
        return []

    def _on_chunk(self, chunk: UpdateChunk, payload: bytes, now: float) -> list[Command]:
        if chunk.device not in self._fleet.members:
            self.complaints.count(chunk.device, "unknown")
            return []
        self._fleet.heard(chunk.device)
        bad = self._inbox.bad_chunks
        commands = self._inbox.chunk(chunk, payload, now)
        if self._inbox.bad_chunks > bad:
            self.complain(chunk.device, "chunk", f"device {chunk.device} sent a chunk that does not fit its digest; it is asked for again")
        if commands:  # it sends without a slot, and is told so once a second
            self.complaints.count(chunk.device, "slot")
        return commands

    def _on_message(self, device: str, kind: str, payload: bytes, now: float) -> list[Command]:
        try:
            message = decode(UP[kind], payload)
        except ProtocolMismatch as error:
            self.complain(device, "version", f"device {device}: {error}")
            return self._inbox.refuse(device, None, "version", str(error)) if kind == "hello" else []
        except InvalidMessage as error:
            self.complain(device, f"bad_{kind}", f"device {device} sent what cannot be read, ignored: {error}")
            return []
        return self._dispatch(device, message, now)

    def _dispatch(self, device: str, message: Message, now: float) -> list[Command]:
        self._fleet.heard(device)
        match message:
            case Hello():
                return self._on_hello(device, message, now)
            case State():
                return self._on_state(device, message, now)
        member = self._fleet.members.get(device)
        if member is None:
            self.complaints.count(device, "unknown")
            return []  # it must greet first, and does so whenever it sees the server
        match message:
            case Need():
                self.broadcast.need(device, message, now)
            case Got():
                self.broadcast.got(device, message.chunks, now)
            case Beat() | Fail() if not self._is_on(message):
                self._count_stray(member, message)
            case Beat():
                self._fleet.works(member.participant, now)
                self._news.progress(member.participant, message, now)
            case Offer():
                return self._on_offer(member, message, now)
            case Fin():
                if not self._inbox.expects(device, message):
                    self.complaints.count(device, "slot")
                commands, received = self._inbox.fin(device, message, now)
                return commands + (self._on_update(member, received, now) if received else [])
            case Fail():
                self._on_fail(member, message, now)
        return []

    # Who is there

    def _on_hello(self, device: str, hello: Hello, now: float) -> list[Command]:
        known = self._fleet.members.get(device)
        was_there = known is not None and known.there
        rival, hello = hello.rival, hello.model_copy(update={"rival": None})
        anew = known is not None and hello.start != known.start
        if known is not None and not known.believes(hello.start):
            if rival != known.start.nonce:
                return self._challenge(known)
            if not self._may_start(known, now):
                return []
            self._displace(known, hello.start)
        elif known is not None and hello != known.hello and not self._may_start(known, now):
            return []
        member = self._fleet.greet(device, hello)
        if member is None:
            self.complain(device, "full", f"device {device} is one too many and gets no task")
            return []
        if not was_there:
            self._note_presence(member, self._news.joined(member, "joined" if known is None else "is back", now))
        if anew:
            self._restarted(member, now)
        if objection := self._fleet.objection(member):
            self.complain(device, "images", f"device {member.participant} is not asked to train: {objection}")
            self._apply(Absent(member.participant, for_good=True), now, None)
            return []
        self._apply(Present(member.participant), now, None)
        return []

    def _on_state(self, device: str, state: State, now: float) -> list[Command]:
        known = self._fleet.members.get(device)
        before, anew = (known.state, state.start != known.start) if known else (None, True)
        if known is not None and not known.believes(state.start):
            late = state.state in ("lost", "stopped")  # said for an agent that is not there any more
            return [] if late else self._challenge(known)
        if known is not None and anew and not self._may_start(known, now):
            return []
        member = self._fleet.note(device, state, now)
        if member is None:
            return []
        if anew:
            self._restarted(member, now)
        if self._fleet.objection(member):
            return []
        if member.there:
            if before in ("lost", "stopped", None):
                self._note_presence(member, self._news.device(member, "is back", now))
            self._apply(Present(member.participant), now, None)
        else:
            long_ago = before is None and not self._course.state.waits_for(member.participant)  # retained since then
            if member.state != before and not long_ago:
                lost = "not seen again yet" if before is None else "is lost; it may return"
                self._note_presence(member, self._news.device(member, "has left" if member.state == "stopped" else lost, now))
            self._apply(Absent(member.participant, for_good=member.state == "stopped"), now, None)
        return []

    def _challenge(self, member: Member) -> list[Command]:
        """Who is there as this device, if not the start that is believed?"""
        return [Send(self._topics.to_device(member.id, "challenge"), encode(Challenge(rival=member.start.nonce)))]

    def _displace(self, member: Member, start: Start) -> None:
        if not member.displace(start):
            return
        text = (
            f"two agents are device {member.participant} ({member.id}) at the same time, as after its state was copied: "
            "end one, delete its --state folder and start it again as a device of its own"
        )
        if self.complain(member.id, "double", text):
            self._course.store.note_double(member.participant)

    def _may_start(self, member: Member, now: float) -> bool:
        """Whether a start of it, or a change in what it says of itself, is one more that is to be believed and kept."""
        if self._starts.take(member.participant, now):
            return True
        self.complain(member.id, "starts", f"device {member.participant} says that it starts again and again; most of that is ignored")
        return False

    def _note_presence(self, member: Member, said: bool) -> None:
        if not said:
            self.complain(member.id, "presence", f"device {member.participant} comes and goes; that is said once a minute at most")

    def _restarted(self, member: Member, now: float) -> None:
        state = self._course.state
        if member.participant in state.failed or member.participant in state.unfit:
            self._apply(Restarted(member.participant), now, None)

    def miss_silent(self, now: float) -> None:
        """Who answers no task is taken for lost: its last will may be, too."""
        for member in self._fleet.take_silent():
            self._note_presence(member, self._news.device(member, "does not answer; it may return", now))
            self._apply(Absent(member.participant, for_good=False), now, None)

    def shut_out(self, device: str, now: float) -> None:
        """It was revoked: nothing more is expected of it. What it has contributed stays."""
        member = self._fleet.members.get(device)
        if member is not None and self._course.state.devices.get(member.participant) != "gone":
            member.state = "stopped"
            self._news.device(member, "is revoked", now)
            self._apply(Absent(member.participant, for_good=True), now, None)

    # Updates

    def _is_on(self, message: Beat | Fail) -> bool:
        """Whether it is of the present round."""
        here = message.run == self._course.run_id and (message.stage, message.round) == self._place
        return here and self._course.state.phase == "training"

    def _count_stray(self, member: Member, message: Beat | Fail) -> None:
        """It is not of the present round. One of a round before is late, which is nobody's fault."""
        if message.run != self._course.run_id:
            self.complaints.count(member.id, "foreign")  # it may not have heard yet of a new run
        elif (message.stage, message.round) > self._place:
            text = f"device {member.participant} speaks of stage {message.stage}, round {message.round}, which has not begun; ignored"
            self.complain(member.id, "foreign", text)

    def _on_fail(self, member: Member, fail: Fail, now: float) -> None:
        participant, state = member.participant, self._course.state
        if participant not in state.owing or state.knows_failure(participant, fail.attempt):  # the message came twice, perhaps
            return
        event: Event
        text = f"device {participant} cannot train in this round ({fail.code}): {fail.reason}"
        match fail.code:
            case "data" | "unfit":  # no later round brings it images, or memory
                event = Unfit(participant, fail.reason or "it cannot train", fail.attempt)
                text += "; it is not asked again until it is restarted"
            case "memory":
                event = RanShort(participant, fail.attempt)
                if participant not in state.retried:
                    text = f"device {participant} ran out of memory: {fail.reason}; it is asked once more, to take less"
            case _:
                event = CannotTrain(participant, fail.attempt)
        self.complain(member.id, fail.code, text)
        self._fleet.remind(participant)  # at once, or should it be asked again after the deadline
        self._apply(event, now, None)

    def _on_offer(self, member: Member, offer: Offer, now: float) -> list[Command]:
        if self._course.store.has_contribution(offer.contribution):  # perhaps of an earlier round: no sign of work in this one
            return self._inbox.offer(member.id, offer, now)
        if objection := self._objection(member, offer):
            return self._refuse(member, offer, *objection)
        self._fleet.works(member.participant, now)
        return self._inbox.offer(member.id, offer, now)

    def _objection(self, member: Member, offer: Offer) -> tuple[RefuseCode, str] | None:
        state = self._course.state
        if offer.participant != member.participant:
            return "identity", f"this device is number {member.participant}, not {offer.participant}"
        run = self._course.run_id
        if (offer.run, offer.stage, offer.round) != (run, state.stage, state.round) or state.phase != "training":
            where = f"stage {state.stage}, round {state.round} of run {run}, {'paused' if state.suspended else state.phase}"
            return "stale", f"it is of stage {offer.stage}, round {offer.round} of run {offer.run}; the server is at {where}"
        if member.participant not in state.owing:
            return "not_chosen", "this round expects no update of this device"
        return None

    def _on_update(self, member: Member, received: ReceivedUpdate, now: float) -> list[Command]:
        """Complete and on disk: record it, and only then acknowledge it."""
        offer, course = received.offer, self._course
        objection = self._objection(member, offer)
        if objection is None:
            try:
                course.check_update(received.path)
            except InvalidPayload as error:
                objection = error.code, str(error)
        if objection is not None:
            commands = self._refuse(member, offer, *objection)
            if objection[0] in ("content", "not_finite"):
                self._apply(Refused(member.participant), now, None)
            return commands
        course.spool.adopt(received.path)  # where equal updates of several devices are one file
        contribution = Contribution.of(offer, received.traffic)
        self._news.contribution(contribution)
        self._apply(Contributed(member.participant, contribution.id), now, lambda step: step.contribute(contribution))
        return self._inbox.accept(offer.contribution)

    def _refuse(self, member: Member, offer: Offer, code: RefuseCode, reason: str) -> list[Command]:
        self.complain(member.id, code, f"refused an update of device {member.participant} ({code}): {reason}")
        return self._inbox.refuse(member.id, offer.contribution, code, reason)

    def complain(self, device: str, code: str, text: str, number: int = 1) -> bool:
        """Count it and say it once in a round; whether it was said."""
        return self.complaints.say(self._place, device, code, text, number)

    def sum_up(self) -> None:
        """Say and store what there was to complain about since the last time."""
        self.complaints.sum_up(self._place)

    @property
    def _place(self) -> tuple[int, int]:
        return self._course.state.stage, self._course.state.round
