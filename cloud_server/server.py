"""The server's control process: one thread and one queue of what happened, around the pure parts.

    transport --Received--> reception --events--> course (coordinator + store) --duty--> workshop (aggregation, torch)
                                                        \\--announcement, tasks--> transport

It never imports torch. What it must not forget is on disk before anybody hears of it, so it may be killed at any time.
"""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Callable

from lwfed.child import Ended, Said
from lwfed.cloud_server import orders
from lwfed.cloud_server.announcement import Announcer
from lwfed.cloud_server.course import Course, Write
from lwfed.cloud_server.duties import Duties
from lwfed.cloud_server.echo import Echo
from lwfed.cloud_server.events import Event, Paused, Prepared, Reconnected, Resumed, Started, TimeUp
from lwfed.cloud_server.fleet import Fleet
from lwfed.cloud_server.gate import Gate
from lwfed.cloud_server.intake import Intake
from lwfed.cloud_server.limits import Door
from lwfed.cloud_server.litter import AHEAD, Litter
from lwfed.cloud_server.news import News
from lwfed.cloud_server.permissions import ANSWERS
from lwfed.cloud_server.reception import Reception
from lwfed.cloud_server.sizes import check_announcement, run_chunk_bytes
from lwfed.cloud_server.telling import tell, waiting
from lwfed.cloud_server.workshop import Starter
from lwfed.errors import PortInUse, Refused, StateError, TransportError, Unreachable
from lwfed.signals import on_signals
from lwfed.transport import base
from lwfed.transport.base import Transport, Will
from lwfed.wire.broadcast import Broadcast
from lwfed.wire.commands import Command
from lwfed.wire.inbox import Inbox
from lwfed.wire.messages import ServerState, encode
from lwfed.wire.topics import FromDevice, FromToken, Stray, Topics, UpdateChunk

SEND_AHEAD = 20  # messages given to the transport and not yet taken over by the broker
TASKS_AHEAD = 500  # of them tasks, which are small; given out anew when all but SEND_AHEAD are gone
FIRST_CONNECTION_S = 15.0
FAREWELL_S = 10.0  # at most, for devices to be told that the run is finished


class Stop:
    """A person or the system wants the server to end."""


Raw = base.Event | Said | Ended | Stop


class Server:
    """`revive` is called when the connection is lost, and says why it had to start a broker again, or nothing; `kill_broker` makes it
    so, for a reason.

    `door` is what messages must pass; None where nobody floods, and time stands still.
    """

    def __init__(
        self,
        course: Course,
        transport: Transport,
        news: News,
        start_worker: Starter,
        *,
        until_done: bool = False,
        revive: Callable[[], str] = lambda: "",
        kill_broker: Callable[[str], None] = lambda why: None,
        gate: Gate | None = None,
        door: Door | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = course.config
        self.over = False
        self._course, self._transport, self._news = course, transport, news
        self._until_done, self._revive, self._kill_broker, self._gate = until_done, revive, kill_broker, gate
        self._database = course.store.database
        self._database.tell = self._on_database
        self._time, self._lost_at, self._away_s = clock, 0.0, 0.0
        self._queue: queue.SimpleQueue[Raw] = queue.SimpleQueue()  # a signal handler may fill it, unlike Queue
        self._topics = Topics(config.run.fleet)
        self._litter = Litter(self._topics)
        self._echo = Echo(self._topics, transport, news.warning)
        self._intake = Intake(self._topics, self._litter, self._echo, door)
        self._fleet = Fleet(self._topics, course.store, config.data.min_images, lambda: course.state.unfit)
        self._chunk_bytes = config.transfer.chunk_bytes
        self._broadcast = Broadcast(self._topics, course.blobs, self._chunk_bytes)
        known = course.store.has_contribution
        transfer = config.transfer
        self._inbox = Inbox(self._topics, course.spool, course.update_limit(), known, transfer.upload_slots, transfer.window)
        self._reception = Reception(self._topics, course, self._fleet, self._inbox, self._broadcast, news, self._apply)
        self._announcer = Announcer(course, transport, self._topics.run, gate.sign if gate else None)
        self._duties = Duties(course, news, start_worker, self._queue.put, self._apply)
        if gate:
            gate.refused = self._on_refused
        self._connected = self._ending = False
        self._give_up_at: float | None = None  # until there has been a connection
        self._unreached: TransportError = Unreachable("no answer from the broker: check its address and that it runs")
        self._told_lost: str | None = None  # what was said of it
        self._announced: tuple[object, ...] | None = None
        self._farewell_until: float | None = None

    @property
    def state_topic(self) -> str:
        return self._topics.server_state

    @property
    def busy(self) -> bool:
        """Whether its worker is at work."""
        return self._duties.busy

    def run(self) -> None:
        """Until the run is finished (`until_done`), SIGINT or SIGTERM; raises what makes it impossible to go on.

        The run itself begins, or goes on, with the first connection.
        """
        with on_signals(self._on_signal):
            try:
                self.begin()
                look_at = self._clock()
                while not self.over:
                    if (now := self._clock()) >= look_at:
                        self.take_orders()
                        look_at = now + orders.LOOK_EVERY_S
                    self.handle(self._next(look_at))
            finally:
                self.end()

    def _clock(self) -> float:
        """Stands still while the database is away: no deadline passes when nothing can be recorded."""
        return self._time() - self._away_s

    def _on_database(self, lost: str | None) -> None:
        self._news.database(lost)
        if lost is not None:
            self._lost_at = self._time()
            if self._ending:
                sys.exit()
        else:
            self._away_s += self._time() - self._lost_at

    def _on_signal(self) -> None:
        self._ending = True
        if self._database.waiting:  # then nobody looks into the queue, and nothing is half done
            sys.exit()
        self._queue.put(Stop())

    def begin(self) -> None:
        self._give_up_at = self._clock() + FIRST_CONNECTION_S
        self._transport.subscribe(self._topics.from_all_devices)
        for filter in self._gate.filters if self._gate else ():
            self._transport.subscribe(filter)
        self._transport.open(f"lwfed-{self._course.config.run.fleet}-server", Will(self.state_topic, self._state(False)), self._arrive)

    def _arrive(self, event: base.Event) -> None:
        """On the transport's thread."""
        if not isinstance(event, base.Received) or self._intake.admits(event):
            self._queue.put(event)

    def end(self) -> None:
        """Idempotent."""
        self._transport.publish(self.state_topic, self._state(False), retain=True)
        self._transport.close()
        self._duties.end()

    def take_orders(self) -> None:
        """Carry out what the operator has ordered since. Before there is a connection nobody knows which devices are there."""
        if self._give_up_at is not None:
            return
        for path in orders.waiting(self._course.root):
            try:
                order = orders.read(path)
            except StateError as error:
                self._news.warning(str(error))
            else:
                self._obey(order)
            orders.forget(path)

    def drain(self) -> int:
        """Handle what has happened without waiting for more; how much there was."""
        count = 0
        while not self._queue.empty():
            self.handle(self._queue.get())
            count += 1
        return count

    def handle(self, event: Raw | None) -> None:
        """React to `event`, and to time; None is time alone."""
        now = self._clock()
        match event:
            case base.Received():
                self._intake.handled(event)
                self._execute(self._receive(event, now))
            case base.Connected():
                self._on_connected(now)
            case base.Disconnected(reason):
                self._on_disconnected(reason)
            case Said() | Ended():
                self._duties.on(event, now)
            case Stop():
                self._reception.sum_up()
                self.over = True
                return
        self._on_time(now)

    def next_wakeup(self, now: float) -> float | None:
        """When to call `handle(None)` if nothing happens before."""
        if self._give_up_at is not None:
            return self._give_up_at
        state = self._course.state
        times = [state.due, self._duties.next_wakeup(), self._farewell_until]
        if self._connected:
            owing = state.owing
            times += [self._broadcast.next_wakeup(now), self._inbox.next_wakeup(now), self._fleet.next_wakeup(owing)]
            times += [self._gate.next_wakeup() if self._gate else None, self._litter.next_wakeup(), self._echo.next_wakeup()]
        return min((one for one in times if one is not None), default=None)

    # Connection

    def _on_connected(self, now: float) -> None:
        first = self._give_up_at is not None
        if self._told_lost is not None:
            self._news.doing("connected" if first else "connected again")
        self._connected, self._told_lost, self._give_up_at = True, None, None
        self._echo.begin()
        if self._gate:
            self._gate.begin()
        self._fit_chunks()
        self._transport.publish(self.state_topic, self._state(True), retain=True)
        self._announced = None
        self._fleet.remind()
        if first:
            self._course.apply(Started(), now)  # nothing to be told but what `waiting` says
            self.take_orders()
            self._follow(now)
            waiting(self._news, self._course, now)
        else:
            self._apply(Reconnected(), now, None)

    def _fit_chunks(self) -> None:
        """Cut blobs so that the broker lets the pieces through; devices notice a changed manifest by themselves."""
        check_announcement(self._course.config, self._transport.packet_limit)
        if not (shapes := self._course.shapes):
            return  # until there are weights
        fitting = run_chunk_bytes(self._course.config, shapes, self._transport.packet_limit)
        if fitting != self._chunk_bytes:
            self._chunk_bytes = fitting
            self._broadcast = self._reception.broadcast = Broadcast(self._topics, self._course.blobs, fitting)

    def _on_disconnected(self, reason: TransportError) -> None:
        self._connected, self._unreached = False, reason
        if self._give_up_at is not None and isinstance(reason, Refused):
            raise reason
        known = self._told_lost is not None
        try:
            if why := self._revive():
                self._news.warning(why)
                return
        except PortInUse:  # whoever has its port now is not to be followed
            raise
        except (TransportError, StateError) as error:  # it is tried again with the next attempt to connect
            self._unreached = Unreachable(f"the broker has died, and cannot be started again: {error}")
            known = self._told_lost == str(self._unreached)
        if not known:
            self._told_lost = str(self._unreached)
            trying = "trying again until it is back" if self._give_up_at is None else f"trying for {FIRST_CONNECTION_S:g} s"
            self._news.warning(f"no connection, {trying}: {self._unreached}")

    def _state(self, online: bool) -> bytes:
        return encode(ServerState(online=online, epoch=self._course.epoch))

    # The run

    def _obey(self, order: orders.Order) -> None:
        now = self._clock()
        if order.do == "pause":
            self._apply(Paused(withdraw=order.now), now, None)
        else:
            self._fleet.remind()  # of tasks that were withdrawn
            self._apply(Resumed(), now, None)
        self._on_time(now)

    def _apply(self, event: Event, now: float, write: Write | None) -> None:
        before = self._course.state
        if isinstance(event, Prepared):
            self._fit_chunks()  # before it counts: what cannot travel is found again by the next start
        notices = self._course.apply(event, now, write)
        tell(self._news, self._course, before, notices, now)

    def _on_time(self, now: float) -> None:
        if self._give_up_at is not None:
            if now >= self._give_up_at:
                raise type(self._unreached)(f"no connection within {FIRST_CONNECTION_S:g} s: {self._unreached}")
            return
        if self._course.state.due is not None and now >= self._course.state.due:
            self._apply(TimeUp(), now, None)
        self._duties.poll(now)
        self._intake.report(self._reception.complain)
        self._reception.miss_silent(now)
        self._follow(now)
        if self._connected:
            self._watch_gate(now)
            if self._queue.empty():
                self._execute(self._inbox.poll(now))
            self._execute(self._broadcast.poll(now, SEND_AHEAD - self._transport.pending))
            if self._broadcast.take_damage():
                self._announcer.publish_sound(self._news.warning)
            self._execute(self._litter.poll(now, AHEAD - self._transport.pending))
            self._execute(self._echo.poll(now))
        self._take_leave(now)

    def _receive(self, message: base.Received, now: float) -> list[Command]:
        topic, payload = message.topic, message.payload
        revoked = self._gate.revoked if self._gate else frozenset()
        if self._gate:
            if topic == ANSWERS:
                self._gate.on_answer(payload)
                return []
            match self._topics.parse(topic):
                case FromToken(token):
                    return self._gate.answer(token, payload)
                case FromDevice(device) | UpdateChunk(device) | Stray(device):
                    if device in revoked:
                        self._turn_away(device, message)
                        return []
                    self._gate.seen(device)
        return self._reception.receive(topic, payload, now)

    def _turn_away(self, device: str, message: base.Received) -> None:
        """It is revoked; of its state nothing stays either."""
        if message.retained:
            self._litter.clear(message)
        else:
            self._reception.complaints.count(device, "revoked")

    def _on_refused(self, token: str, device: str | None, reason: str) -> None:
        of = f"of device {device}" if device else token
        self._reception.complain(device or token, "enrolment", f"no certificate was issued by the token {of}: {reason}")

    def _watch_gate(self, now: float) -> None:
        if self._gate:
            self._execute(self._gate.poll(now))
            for device in self._gate.newly_revoked():
                self._reception.shut_out(device, now)
                self._litter.find(device)
            if self._gate.take_unheeded(now):
                self._kill_broker("did not confirm who may not come in any more, as in a flood, and")

    def _follow(self, now: float) -> None:
        """Let everybody know where the run stands, and do what that asks for."""
        self._announce()
        self._duties.follow()
        state = self._course.state
        if self._connected and state.owing:
            room = TASKS_AHEAD if self._transport.pending < SEND_AHEAD else 0
            self._execute(self._fleet.tasks(self._course.run_id, state.stage, state.round, state.owing, now, room))
            if self._fleet.reminded:  # a task without its announcement cannot begin either
                self._announcer.publish()

    def _announce(self) -> None:
        state = self._course.state
        where = (state.phase, state.stage, state.round, state.paused, state.parts)
        if where == self._announced:
            return
        self._announced = where
        if state.phase != "training":
            ended = "the run is paused, and this round begins again later" if state.suspended else "the round is closed"
            self._execute(self._inbox.clear("stale", ended))
            self._course.tidy()
            self._reception.sum_up()
        self._inbox.limit_bytes = self._course.update_limit()
        self._announcer.publish()

    def _take_leave(self, now: float) -> None:
        """When all is done, end as soon as the broker has the last announcement."""
        if not (self._until_done and self._duties.finished):
            return
        if self._farewell_until is None:
            self._farewell_until = now + FAREWELL_S
        self.over = now >= self._farewell_until or (self._connected and self._transport.pending == 0)

    def _execute(self, commands: list[Command]) -> None:
        for command in commands:
            self._transport.execute(command)

    def _next(self, latest: float) -> Raw | None:
        now = self._clock()
        wakeup = self.next_wakeup(now)
        try:
            return self._queue.get(timeout=max(0.0, (latest if wakeup is None else min(latest, wakeup)) - now))
        except queue.Empty:
            return None
