"""What a device says and does on the fleet's topics: connection, server, run. No socket, no clock, no thread.

`handle` takes one event, `poll` does what is due; both return effects for the shell in `agent`. Whether the server is
there is known from its retained state alone; what it says is obeyed in the order of (epoch, seq).

The server's state, our greeting and our own state may each be lost, and nobody would ask for them. So whoever gets no
order asks for the first or says the second again, less and less often.
"""

from __future__ import annotations

from contextlib import suppress
from random import Random

from lwfed.edge_agent.events import Effect, EndWorker, Event, Exit, Show, Stop, Tell
from lwfed.edge_agent.handover import Link
from lwfed.edge_agent.journal import Journal, Seen
from lwfed.edge_agent.work import Work
from lwfed.errors import DiskTrouble, Forbidden, InvalidMessage, ProtocolMismatch, Refused, TransportError, Unreachable, Untrusted
from lwfed.seeds import derive
from lwfed.transport.base import Connected, Disconnected, Received, Sent
from lwfed.transport.mqtt_errors import NAME_AUTHORITY
from lwfed.wire import messages, topics
from lwfed.wire.commands import Send, Subscribe
from lwfed.wire.messages import Challenge, DeviceState, Hello, Manifest, Run, ServerState, State, Task, decode
from lwfed.wire.report import Traffic
from lwfed.wire.retry import Retry
from lwfed.wire.signed import Believe, unverified
from lwfed.wire.topics import Topics
from lwfed.wire.upload import LEAST_PACKET_BYTES, PACKET_MARGIN_BYTES

QUIET_S = 5.0  # connected for so long without a sign of a server: say it
GREET_S = 15.0  # connected without an order of the server for so long: greet it again
SAVE_BYTES, SAVE_S = 65_536, 5.0  # what of the traffic a kill makes forget; an idle device writes nothing
REVOKED = "it may have been revoked (`cloud-server status` says so): then enrol it anew, by another name and with another --state"
STRANGER = (
    "it is of another authority than when this device was enrolled, or for another host: is this the right server? "
    "If it is, enrol the device again (`edge-agent enrol`) with another --state"
)
GREET_LONGEST_S = 600.0  # a thousand idle devices then cost it two greetings a second


def to_enrolled(reason: TransportError) -> TransportError:
    """Why there is no connection, to a device that has its certificate and the authority by enrolment."""
    match reason:
        case Forbidden():
            return Forbidden(f"{reason}; {REVOKED}")
        case Untrusted():
            return Untrusted(str(reason).replace(NAME_AUTHORITY, STRANGER))
    return reason


class TrafficCount:
    """Bytes since the device joined the run, over all starts of the agent. Those before the first announcement are of its run."""

    def __init__(self, journal: Journal, link: Link) -> None:
        self._journal, self._link = journal, link
        self._run: str | None = None
        self._before = Traffic(down=0, up=0)
        self._down = self._up = 0  # on this link, when the run was joined
        self._saved, self._saved_s = 0, float("-inf")

    def follow(self, run: str) -> None:
        if run == self._run:
            return
        if self._run is not None:
            self.save()
            self._down, self._up = self._link.received_bytes, self._link.sent_bytes
        self._run, self._before = run, self._journal.traffic(run)

    def now(self) -> Traffic:
        down, up = self._link.received_bytes - self._down, self._link.sent_bytes - self._up
        return Traffic(down=self._before.down + down, up=self._before.up + up)

    def poll(self, now: float) -> None:
        """Save it while it grows, since nobody says that the agent will be killed."""
        if self._moved() >= self._saved + SAVE_BYTES and now >= self._saved_s + SAVE_S:
            self._saved_s = now
            self.save()

    def save(self) -> None:
        if self._run is not None:
            with suppress(DiskTrouble):  # no count is worth the end of the agent
                self._journal.count(self._run, self.now())
                self._saved = self._moved()

    def _moved(self) -> int:
        return self._link.received_bytes + self._link.sent_bytes


class Session:
    def __init__(
        self,
        fleet: Topics,
        hello: Hello,
        journal: Journal,
        work: Work,
        link: Link,
        wait_s: float,
        now: float,
        believe: Believe | None = None,
    ) -> None:
        """`believe` tells an enrolled device which announcements are its server's; without it all are."""
        self._believe = believe
        self._topics, self._hello, self._journal, self._work = fleet, hello, journal, work
        self._device = journal.device
        self._link, self._traffic = link, TrafficCount(journal, link)
        self._give_up_at: float | None = now + wait_s  # None once there has been a connection
        self._wait_s = wait_s
        self._reason: TransportError | None = None  # why there is no connection
        self._connected = False
        self._server: ServerState | None = None  # while it is online
        self._early: Run | None = None  # an announcement that overtook the server's state
        self._run: Run | None = None
        self._quiet_until: float | None = None
        self._greeting = Retry(Random(derive(0, "greeting", self._device)), GREET_S, GREET_LONGEST_S)
        self._state: DeviceState | None = None  # as published on this connection
        self._invalid = 0
        self._mismatched = False  # a message of another version was ignored, and that was said

    def begin(self) -> list[Effect]:
        if (update := self._work.handover.update) is not None:
            self._traffic.follow(update.task.run)
        return self._work.recall()

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Connected():
                return self._on_connected(now)
            case Disconnected(reason):
                return self._on_disconnected(reason)
            case Received(topic, payload):
                return self._on_message(topic, payload, now)
            case Sent():
                return []
            case Stop():
                self._traffic.save()
                return [EndWorker(), Tell("stopped", "stopped"), Exit()]
            case _:
                return self._work.on_worker(event, now)

    def poll(self, now: float) -> list[Effect]:
        if self._give_up_at is not None and now >= self._give_up_at:
            return [
                Exit(
                    self._reason or Unreachable(f"no answer from the broker within {self._wait_s:g} s: check the address and that it runs")
                )
            ]
        self._traffic.poll(now)
        effects = self._work.poll(now, self._server is not None, self._traffic.now())
        if self._quiet_until is not None and now >= self._quiet_until:
            self._quiet_until = None
            effects.append(Tell("server", "no server on this fleet yet; waiting for one (does --fleet match?)", {"online": False}))
        return [*effects, *self._greet(now), *self._publish("training" if self._work.busy else "ready")]

    def next_wakeup(self, now: float) -> float | None:
        times = (self._give_up_at, self._quiet_until, self._greeting.due, self._work.next_wakeup(now, self._server is not None))
        return min((time for time in times if time is not None), default=None)

    # Connection

    def _on_connected(self, now: float) -> list[Effect]:
        first, self._give_up_at = self._give_up_at is not None, None
        self._connected, self._reason, self._state, self._quiet_until = True, None, None, now + QUIET_S
        self._lose_server()
        self._greeting.wait(now)
        joined = Tell("joined", f"connected as {self._device}" if first else "connected again", {"device": self._device})
        return [joined, *self._say_packet_limit()]

    def _on_disconnected(self, reason: TransportError) -> list[Effect]:
        self._connected, self._quiet_until = False, None
        self._greeting.stop()
        self._lose_server()
        if self._believe:
            reason = to_enrolled(reason)
        known = self._reason is not None and (isinstance(self._reason, Forbidden) or not isinstance(reason, Forbidden))
        self._reason = reason
        if self._give_up_at is not None and isinstance(reason, Refused):
            return [Exit(reason)]
        if known:
            return []
        self._traffic.save()
        again = f"for {self._wait_s:g} s" if self._give_up_at is not None else "until it is back"
        return [Tell("disconnected", f"no connection, trying {again}: {reason}", {"reason": str(reason)})]

    def _say_packet_limit(self) -> list[Effect]:
        limit = self._link.packet_limit
        if limit is None or limit >= LEAST_PACKET_BYTES:
            return []
        text = (
            f"the broker takes packets of {limit} bytes at most, too few to hand over any update: raise its limit "
            f"(mosquitto: max_packet_size) to the run's transfer.chunk_bytes plus {PACKET_MARGIN_BYTES}"
        )
        return [Tell("warning", text)]

    def _lose_server(self) -> None:
        self._server = self._early = None

    def _greet(self, now: float) -> list[Effect]:
        if not self._greeting.is_due(now):
            return []
        self._greeting.asked(now)
        return [self._send("hello", self._hello) if self._server else Subscribe(self._topics.server_state)]  # which brings what is retained

    def _publish(self, state: DeviceState) -> list[Effect]:
        if not self._connected or state == self._state:
            return []
        self._state = state
        return [self._send("state", State(state=state, start=self._hello.start), retain=True)]

    def _send(self, kind: str, message: State | Hello, retain: bool = False) -> Send:
        return Send(self._topics.from_device(self._device, kind), messages.encode(message), retain)

    # Messages

    def _on_message(self, topic: str, payload: bytes, now: float) -> list[Effect]:
        try:
            return self._route(topic, payload, now)
        except ProtocolMismatch as error:  # stray or forged: which versions the server speaks, its state alone says
            known, self._mismatched = self._mismatched, True
            return [] if known else [Tell("warning", f"ignored: {error}")]
        except InvalidMessage as error:
            self._invalid += 1  # said at the 1st, 2nd, 4th, 8th...: a broken sender must not fill the log
            again = f" ({self._invalid} so far)" if self._invalid > 1 else ""
            return [Tell("warning", f"ignored a message: {error}{again}")] if self._invalid.bit_count() == 1 else []

    def _route(self, topic: str, payload: bytes, now: float) -> list[Effect]:
        match self._topics.parse(topic):
            case topics.ServerState():
                return self._on_server(messages.decode_server_state(payload), now)
            case topics.RunTopic():
                return self._on_run(decode(Run, self._believe(payload) if self._believe else unverified(payload)))
            case topics.BlobChunk(blob, index, None | self._device):
                fetching = not self._work.downloads.complete
                self._work.downloads.on_chunk(blob, index, payload)
                if fetching and self._work.downloads.complete:
                    self._traffic.save()
                return [Show("receiving the model", *self._work.downloads.progress())]
            case topics.ToDevice(self._device, kind) if kind in messages.DOWN:
                self._greeting.wait(now)
                return self._on_order(decode(messages.DOWN[kind], payload))
        return []

    def _on_order(self, message: messages.Message) -> list[Effect]:
        match message:
            case Task():
                if self._work.is_on(message):  # the server wants to know whether anybody is here
                    self._state = None
                return self._work.assign(message)
            case Challenge(rival=rival) if rival != self._hello.start.nonce:
                return [self._send("hello", self._hello.model_copy(update={"rival": rival}))]
            case Manifest():
                self._work.downloads.on_manifest(message)
                return []
            case messages.Grant() | messages.Wait() | messages.Miss() | messages.Done() | messages.Refuse():
                effects = self._work.handover.answer(message)
                self._traffic.save()
                return effects
        return []

    # Server and run

    def _on_server(self, state: ServerState, now: float) -> list[Effect]:
        if self._believe and state.online and state.epoch < self._journal.seen.epoch:  # then it would follow what was announced long ago
            raise InvalidMessage(
                f"the server's state is of its start {state.epoch}, and {self._journal.seen.epoch} has announced a run: it is repeated by "
                "somebody, or the server has lost the record of its starts: set its clock right and start it again, and if that does not "
                "help, serve the earlier run for a moment and then this one"
            )
        first, self._quiet_until = self._quiet_until is not None, None
        if state.online and not messages.speaks_our_version(state):
            versions = f"{state.protocol_min} to {state.protocol_max}"
            text = f"the server speaks protocol versions {versions}, this edge-agent {messages.PROTOCOL}: {messages.UPGRADE}"
            return [EndWorker(), Exit(ProtocolMismatch(text))]
        known, self._server = self._server, state if state.online else None
        if not state.online:
            if known is not None and state.epoch < known.epoch:
                self._server = known  # the late last will of an earlier server
                return []
            if known is None and not first:
                return []  # asked for again
            return [Tell("server", "the server is offline; waiting for it", {"online": False})]
        if state == known:
            return []
        self._greeting.wait(now)
        effects: list[Effect] = [Tell("server", "the server is online", {"online": True}), self._send("hello", self._hello)]
        if state.epoch < self._journal.seen.epoch:
            self._journal.saw(Seen(epoch=state.epoch, seq=0))
            effects.append(Tell("warning", "the server has started anew and forgotten earlier runs"))
        effects += self._work.resume(state.epoch)
        early, self._early = self._early, None
        return effects + (self._on_run(early) if early else [])

    def _on_run(self, run: Run) -> list[Effect]:
        if self._server is None or run.epoch > self._server.epoch:
            self._early = run
            return [] if self._server is None else [Subscribe(self._topics.server_state)]  # what it said of its start was lost: ask for it
        seen = Seen(epoch=run.epoch, seq=run.seq)
        if seen < self._journal.seen or run.epoch < self._server.epoch:
            return []  # replayed, or left behind by the server before its restart
        if seen != self._journal.seen:
            self._journal.saw(seen)
        before, self._run = self._run, run
        self._traffic.follow(run.run)
        if before is None or before.run != run.run:
            self._journal.keep_run(run.run)
        return [*self._say_run(before, run), *self._work.announce(run)]

    def _say_run(self, before: Run | None, run: Run) -> list[Effect]:
        fields = {"run": run.run, "stage": run.stage, "round": run.round, "phase": run.phase}
        if run.over:
            done = before is not None and before.over and before.run == run.run
            return [] if done else [Tell("run", f"run {run.run} is {run.phase}; waiting for another", fields)]
        was_paused = before is not None and before.run == run.run and before.paused
        if run.paused != was_paused:
            how = "is paused by its operator: no further round begins until it goes on" if run.paused else "goes on"
            return [Tell("run", f"run {run.run} {how}", {**fields, "paused": run.paused})]
        if before is None or before.run != run.run:
            place = f"stage {run.stage} of {run.stages}, round {run.round} of {run.rounds}, {run.phase}"
            return [Tell("run", f"run {run.run}: {place}", fields)]
        return []
