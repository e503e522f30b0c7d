"""Where a process dies that is to die at a point of its own: at a transaction that is then undone, or before something is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from lwfed.edge_agent.facts import MemoryFacts
from lwfed.tools.faults.schedule import Kill, Point
from lwfed.transport.memory import MemoryBroker, MemoryTransport


class Killed(BaseException):
    """The process ends here, whatever it was about."""

    def __init__(self, how: Kill) -> None:
        self.how = how


class Fuse:
    """Kills the process that passes the point at which `kill` is to happen."""

    def __init__(self) -> None:
        self.kill: Kill | None = None
        self._passed: Counter[Point] = Counter()
        self._committed = False

    def at_commit(self) -> None:
        self._committed = True
        self._pass("uncommitted")

    def at_publication(self) -> None:
        if self._committed:
            self._committed = False
            self._pass("unpublished")

    def _pass(self, point: Point) -> None:
        kill = self.kill
        if kill is None or kill.point != point:
            return
        self._passed[point] += 1
        if self._passed[point] > kill.skip:
            raise Killed(kill)


class FusedTransport(MemoryTransport):
    def __init__(self, broker: MemoryBroker, fuse: Fuse, published: Callable[[str, bytes], None]) -> None:
        super().__init__(broker)
        self._fuse, self._published = fuse, published

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._fuse.at_publication()
        self._published(topic, payload)
        super().publish(topic, payload, retain=retain)


class FusedFacts(MemoryFacts):
    def __init__(self, held: Mapping[str, str], fuse: Fuse) -> None:
        super().__init__(held)
        self._fuse = fuse

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with super().transaction():
            yield
            self._fuse.at_commit()
