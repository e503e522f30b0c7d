"""Who subscribes to what, found without a look at every client: with hundreds of them that look would take longest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

from lwfed.transport.packets import matches


class Numbered(Protocol):
    number: int  # of its opening


Client = TypeVar("Client", bound=Numbered)


class Subscriptions(Generic[Client]):
    def __init__(self) -> None:
        self._exact: dict[str, set[Client]] = {}  # topic -> clients
        self._below: dict[str, set[Client]] = {}  # a -> clients of a/+
        self._under: dict[str, set[Client]] = {}  # a -> clients of a/#
        self._others: dict[str, set[Client]] = {}  # filter -> clients

    def add(self, client: Client, filter: str) -> None:
        table, key = self._place(filter)
        table.setdefault(key, set()).add(client)

    def remove(self, client: Client, filters: Iterable[str]) -> None:
        for filter in filters:
            table, key = self._place(filter)
            clients = table.get(key, set())
            clients.discard(client)
            if not clients:
                table.pop(key, None)

    def of(self, topic: str) -> list[Client]:
        """Those who get what is published there, in the order of their opening."""
        parent = topic.rpartition("/")[0]
        found: list[Iterable[Client]] = [self._exact.get(topic, ()), self._below.get(parent, ()), self._under.get(topic, ())]
        while parent:
            found.append(self._under.get(parent, ()))
            parent = parent.rpartition("/")[0]
        found += [clients for filter, clients in self._others.items() if matches(filter, topic)]
        return sorted(set[Client]().union(*found), key=lambda client: client.number)

    def _place(self, filter: str) -> tuple[dict[str, set[Client]], str]:
        parent, _, last = filter.rpartition("/")
        if "+" not in filter and "#" not in filter:
            return self._exact, filter
        if last in ("+", "#") and parent and "+" not in parent:
            return self._below if last == "+" else self._under, parent
        return self._others, filter
