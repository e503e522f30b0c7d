"""A device hands over its update and keeps it until the server says `done`.

    offering --grant--> sending --all sent--> finishing --done--> done
    sending, finishing --wait--> offering       finishing --miss--> sending
    any --refuse--> refused, but of a digest: offered again, three times

After a reconnection the offer is made again; the grant says what is missing, so nothing arrives twice.

What the broker has not taken over yet has not left. While anything has not, no answer can be missed, however slow the link is: a
question is repeated only when it has left. But nothing leaves over a dead link either. The keep-alive of MQTT finds a connection
that is dead; a broker that answers pings and takes over nothing is found here, by patience. Giving a link up throws away what is
on its way, so patience doubles each time, until it lasts for a chunk of that link: else none would ever get across. What does not
go up in two minutes, the keep-alive cuts off (docs/PROTOCOL.md).
"""

from __future__ import annotations

import hashlib
from random import Random
from typing import Literal

from lwfed.blobs import BlobStore, check_cut
from lwfed.errors import ConfigError, InvalidMessage, InvalidPayload
from lwfed.wire.commands import Command, Reconnect, Send
from lwfed.wire.messages import Done, Fin, Grant, Miss, Offer, Refuse, Wait, encode
from lwfed.wire.ranges import indices
from lwfed.wire.report import Traffic
from lwfed.wire.retry import LONGEST_PATIENCE_S, Retry
from lwfed.wire.topics import Topics

ANSWER_S = 5.0
PATIENCE_S = 60.0  # with a link over which nothing leaves
MAX_DIGEST_REFUSALS = 3
DEFAULT_WINDOW = 4
PACKET_MARGIN_BYTES = 512  # topic and headers of a packet
REPORT_BYTES, LOSS_BYTES, DIGEST_BYTES = 13_000, 24, 67  # of an offer: a full memory curve; each epoch's loss; each chunk
LEAST_PACKET_BYTES = REPORT_BYTES + LOSS_BYTES + DIGEST_BYTES + PACKET_MARGIN_BYTES  # less than that carries no offer

UploadState = Literal["offering", "sending", "finishing", "done", "refused"]


def contribution_id(run: str, stage: int, round: int, device: str, digest: str) -> str:
    """The identity of an update, 32 hex digits: sent twice, it counts once."""
    text = "\x1f".join((run, str(stage), str(round), device, digest))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def fitting_chunk_bytes(size: int, chunk_bytes: int, epochs: int, packet_limit: int | None) -> int:
    """`chunk_bytes`, or less where the broker takes no larger packets than `packet_limit` (None: any).

    Raises ConfigError where a blob of `size` bytes cannot travel then, with the report of so many `epochs`.
    """

    def packet_bytes(chunk_bytes: int) -> int:
        offer = REPORT_BYTES + LOSS_BYTES * epochs + DIGEST_BYTES * -(-size // chunk_bytes)
        return max(offer, chunk_bytes) + PACKET_MARGIN_BYTES

    needed = packet_bytes(chunk_bytes)
    limit = needed if packet_limit is None else packet_limit
    fitting = min(chunk_bytes, limit - PACKET_MARGIN_BYTES)
    try:
        check_cut(size, fitting)
    except InvalidPayload as error:
        if fitting == chunk_bytes:
            raise ConfigError(str(error)) from None
    else:
        if packet_bytes(fitting) <= limit:
            return fitting
    raise ConfigError(too_small(limit, needed))


def too_small(limit: int, needed: int) -> str:
    """What is said of a broker's packets."""
    return f"the broker takes packets of {limit} bytes at most; raise its limit (mosquitto: max_packet_size) to {needed}"


class Upload:
    """One update on its way. `offer.manifest` must be the store's manifest of the blob."""

    def __init__(self, topics: Topics, device: str, offer: Offer, store: BlobStore, seed: int) -> None:
        self.state: UploadState = "offering"
        self.window = DEFAULT_WINDOW  # how many chunks may be under way at once
        self.refusal: Refuse | None = None
        self._topics = topics
        self._device = device
        self._offer = offer
        self._store = store
        self._worker = ""
        self._queue: list[int] = []  # chunks to send, the next one last
        self._pause_s: float | None = None  # a Wait that no poll has seen yet
        self._digest_refusals = 0
        self._fins = 0  # not answered yet
        self._old_misses = 0  # answers to come that know nothing of chunks sent since
        self._room = 0  # that the last poll has left
        self._patience_s = PATIENCE_S
        self._stalled_at: float | None = None  # when patience ends; None: all has left
        self._leaving = False  # the last question has not left, as far as is known
        self._retry = Retry(Random(seed), ANSWER_S)
        self._retry.now()

    def on_grant(self, grant: Grant) -> None:
        """A second one answers an offer that was repeated, and knows nothing of what the first has set going."""
        if grant.contribution == self._offer.contribution and (
            self.state == "offering" or (self.state in ("sending", "finishing") and grant.worker != self._worker)
        ):
            self.window = grant.window
            self._worker = grant.worker
            self._send_these(grant.missing)

    def on_miss(self, miss: Miss) -> None:
        if miss.contribution != self._offer.contribution:
            return
        self._fins = max(0, self._fins - 1)
        if self._old_misses:
            self._old_misses -= 1
        elif self.state == "finishing":
            self._old_misses = self._fins
            self._send_these(miss.missing)

    def on_wait(self, wait: Wait) -> None:
        if wait.contribution == self._offer.contribution and self.state in ("offering", "sending", "finishing"):
            self.state = "offering"
            self._fins = self._old_misses = 0
            self._pause_s = wait.retry_s

    def on_done(self, done: Done) -> None:
        if done.contribution == self._offer.contribution:
            self.state = "done"

    def on_refuse(self, refuse: Refuse) -> None:
        if refuse.contribution != self._offer.contribution or self.state == "done":
            return
        self._digest_refusals += refuse.code == "digest"
        if refuse.code == "digest" and self._digest_refusals <= MAX_DIGEST_REFUSALS:
            self.reset()
        else:
            self.state = "refused"
            self.refusal = refuse

    def reset(self) -> None:
        """The connection or the server is back: offer again."""
        if self.state not in ("done", "refused"):
            self.state = "offering"
            self._fins = self._old_misses = 0
            self._pause_s = self._stalled_at = None
            self._leaving = False
            self._retry.now()

    def poll(self, now: float, room: int, traffic: Traffic) -> list[Command]:
        """At most `room` chunks (the window less what the transport has pending), or the question that is due."""
        if self.state in ("done", "refused"):
            self._retry.stop()
            self._stalled_at = None
            return []
        if self._pause_s is not None:
            self._retry.answered()
            self._retry.at(now + self._pause_s)
            self._pause_s = None
        if self._is_stalled(now, room):
            return self._give_up()
        commands = self._chunks(now, room) if self.state == "sending" else []
        if self._retry.is_due(now) and not self._is_leaving and not commands:  # the traffic that is told has the last chunks in it
            commands += self._question(now, traffic)
        self._room = room - sum(isinstance(command, Send) for command in commands)
        return commands

    def next_wakeup(self, now: float) -> float | None:
        """None when it is over."""
        times = [time for time in (self._stalled_at, None if self._is_leaving else self._retry.due) if time is not None]
        return max(now, min(times)) if times else None

    def progress(self) -> tuple[int, int]:
        """Chunks sent and chunks in all."""
        count = len(self._offer.manifest.digests)
        sent = {"offering": 0, "sending": count - len(self._queue)}.get(self.state, count)
        return sent, count

    def _send_these(self, missing: str) -> None:
        try:
            wanted = indices(missing, len(self._offer.manifest.digests))
        except InvalidMessage:
            return
        self.state = "sending"
        self._queue = wanted[::-1]
        self._pause_s, self._leaving = None, False
        self._retry.now()

    def _chunks(self, now: float, room: int) -> list[Command]:
        commands: list[Command] = []
        while self._queue and len(commands) < min(room, self.window):
            index = self._queue.pop()
            topic = self._topics.update_chunk(self._device, self._worker, self._offer.contribution, index)
            commands.append(Send(topic, self._store.chunk(self._offer.manifest, index)))
        if commands and self._stalled_at is None:
            self._stalled_at = now + self._patience_s
        if self._queue:
            self._retry.stop()
        else:
            self.state = "finishing"
            self._retry.now()
        return commands

    @property
    def _is_leaving(self) -> bool:
        """Whether what was asked waits for what leaves before it."""
        return self._leaving and self._stalled_at is not None

    def _is_stalled(self, now: float, room: int) -> bool:
        """Whether something should have left, and nothing has for as long as patience lasts."""
        if room >= self.window:
            if self._is_leaving:
                self._retry.left(now)
            self._stalled_at, self._leaving = None, False
        elif self._stalled_at is None or room > self._room:
            self._stalled_at = now + self._patience_s
        return self._stalled_at is not None and now >= self._stalled_at

    def _give_up(self) -> list[Command]:
        """The connection; the next one gets more patience."""
        text = (
            f"nothing of the update has left for {self._patience_s:g} s; over a link as slow as that a smaller transfer.chunk_bytes helps"
        )
        self._patience_s = min(2 * self._patience_s, LONGEST_PATIENCE_S)
        self.reset()
        return [Reconnect(text)]

    def _question(self, now: float, traffic: Traffic) -> list[Command]:
        commands: list[Command] = []
        if self._retry.suspect(now):
            commands.append(Reconnect("the server does not answer about the update"))
        if self.state == "offering":
            commands.append(Send(self._topics.from_device(self._device, "offer"), encode(self._offer)))
        else:
            fin = Fin(contribution=self._offer.contribution, traffic=traffic)
            commands.append(Send(self._topics.from_device(self._device, "fin"), encode(fin)))
            self._fins += 1
        self._retry.asked(now)
        self._leaving = True
        return commands
