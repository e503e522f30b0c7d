"""A bad link, for one device: a TCP proxy in front of a broker that is slow, late, stalls, and cuts connections at any byte.

    sender ──read──► its turn on the line: rate ──► on its way: delay ──write──► receiver

Each direction has a line of its own; stalls and cuts are of both. Bytes are counted when they have had their turn: those on
their way are lost with a cut, like those in the buffers of the kernel, which were never counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from random import Random
from typing import Any

PIECE_BYTES = 16_384  # read at a time; less on a slow link, so that bytes flow evenly
PIECE_S = 0.05
BUFFER_BYTES = 65_536  # of the kernel, for what we read: its own choice would take whole updates off a sender at once


@dataclass(frozen=True)
class Link:
    """Stalls and cuts come at regular intervals, from a random moment of the first one; with bytes between cuts, at random."""

    rate: float | None = None  # bytes a second, each way; None: whatever this machine does
    delay_s: float = 0.0  # one way
    stall_every_s: float | None = None
    stall_s: float = 0.0  # nothing passes for so long, and nothing is lost
    cut_every_s: float | None = None
    cut_every_bytes: int | None = None  # on average, of both directions together


@dataclass(frozen=True)
class Counts:
    """Of all connections so far."""

    up_bytes: int
    down_bytes: int
    cuts: int


class Proxy:
    """Within its block `port` on loopback leads to `target` over `link`. `seed` decides on the moments of stalls and cuts."""

    def __init__(self, target: tuple[str, int], link: Link, seed: int) -> None:
        self._target = target
        self._link = link
        self._random = Random(seed)
        self._passed = {"up": 0, "down": 0}
        self._cuts = 0
        self._until_cut = self._bytes_to_cut()
        self._stalled_until = 0.0  # by the loop's clock
        self._connections: set[asyncio.Event] = set()  # set to cut one
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._listener = socket.socket()
        self._open: set[socket.socket] = set()  # until `_serve`, which may be cancelled at any moment, has closed them

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def counts(self) -> Counts:
        return Counts(self._passed["up"], self._passed["down"], self._cuts)

    def __enter__(self) -> Proxy:
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)  # what it accepts inherits it
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self._listener.setblocking(False)
        self._thread.start()
        for service in (self._accept(), self._stall(), self._cut()):
            self._loop.call_soon_threadsafe(self._spawn, service)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        for one in (self._listener, *self._open):
            one.close()

    # From here on, on the loop's thread.

    def _spawn(self, service: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(service)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _stop(self) -> None:
        await _end(self._tasks - {asyncio.current_task()})

    async def _accept(self) -> None:
        while True:
            device, _ = await self._loop.sock_accept(self._listener)
            self._open.add(device)
            self._spawn(self._serve(device))

    async def _serve(self, device: socket.socket) -> None:
        """One connection, until either side or a cut ends it."""
        cut, broker = asyncio.Event(), socket.socket()
        self._open.add(broker)
        broker.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        for end in (device, broker):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        mine: set[asyncio.Task[None]] = set()
        try:
            await self._loop.sock_connect(broker, self._target)
            self._connections.add(cut)
            ends = [self._spawn(_waited(cut))]
            for direction, source, sink in (("up", device, broker), ("down", broker, device)):
                lane: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue()
                ends.append(self._spawn(self._write(lane, sink)))
                mine.add(self._spawn(self._read(direction, source, lane)))
            mine.update(ends)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        except OSError:  # the broker is down: so the device is told
            pass
        finally:
            self._connections.discard(cut)
            await _end(mine)
            for end in (device, broker):
                end.close()
                self._open.discard(end)

    async def _read(self, direction: str, source: socket.socket, lane: asyncio.Queue[tuple[float, bytes] | None]) -> None:
        """What `source` sends, as fast as the line takes it; None into the lane at its end."""
        rate, free_at = self._link.rate, 0.0
        piece = PIECE_BYTES if rate is None else max(1, min(PIECE_BYTES, int(rate * PIECE_S)))
        with contextlib.suppress(OSError):
            while data := await self._loop.sock_recv(source, piece):
                await self._clear()
                if rate is not None:
                    free_at = max(free_at, self._loop.time()) + len(data) / rate
                    await self._sleep_until(free_at)
                data = data[: self._until_cut]
                self._passed[direction] += len(data)
                lane.put_nowait((self._loop.time() + self._link.delay_s, data))
                if self._until_cut is not None:
                    self._until_cut -= len(data)
                    if self._until_cut == 0:
                        self._until_cut = self._bytes_to_cut()
                        self._cuts += 1
                        break
        lane.put_nowait(None)

    async def _write(self, lane: asyncio.Queue[tuple[float, bytes] | None], sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (item := await lane.get()) is not None:
                due, data = item
                await self._sleep_until(due)
                await self._clear()
                await self._loop.sock_sendall(sink, data)

    async def _stall(self) -> None:
        if (every_s := self._link.stall_every_s) is None:
            return
        await asyncio.sleep(self._random.uniform(0, every_s))
        while True:
            self._stalled_until = self._loop.time() + self._link.stall_s
            await asyncio.sleep(every_s)

    async def _cut(self) -> None:
        if (every_s := self._link.cut_every_s) is None:
            return
        await asyncio.sleep(self._random.uniform(0, every_s))
        while True:
            self._cuts += len(self._connections)
            for connection in self._connections:
                connection.set()
            await asyncio.sleep(every_s)

    async def _clear(self) -> None:
        """Wait for the end of a stall."""
        while (wait_s := self._stalled_until - self._loop.time()) > 0:
            await asyncio.sleep(wait_s)

    async def _sleep_until(self, when: float) -> None:
        if (wait_s := when - self._loop.time()) > 0:
            await asyncio.sleep(wait_s)

    def _bytes_to_cut(self) -> int | None:
        mean = self._link.cut_every_bytes
        return None if mean is None else self._random.randint(1, 2 * mean)


async def _waited(event: asyncio.Event) -> None:
    await event.wait()


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
