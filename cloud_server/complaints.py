"""What the server has against devices, counted by device and code: said once in a round, summed up and stored at its end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Container

from lwfed.cloud_server.news import News
from lwfed.cloud_server.store import Store

MAX_KEYS = 1000  # of senders that are no members: their names are whatever they like
OTHERS = "others*"  # no device has such a name

Place = tuple[int, int]  # stage, round


class Complaints:
    """`members`: names of the devices that have been admitted, whose totals over the run are stored."""

    def __init__(self, store: Store, news: News, members: Container[str]) -> None:
        self._store, self._news, self._members = store, news, members
        self._totals = {device.id: Counter(device.complaints) for device in store.devices()}
        self._counts: Counter[tuple[str, str]] = Counter()  # (device, code), since they were last summed up
        self._said: set[tuple[str, str]] = set()  # in the round `_in`
        self._in: Place = (0, 0)

    def count(self, device: str, code: str, number: int = 1) -> None:
        """What an honest device may be the cause of too is not said at once."""
        known = device in self._members or (device, code) in self._counts or len(self._counts) < MAX_KEYS
        self._counts[device if known else OTHERS, code] += number

    def say(self, place: Place, device: str, code: str, text: str, number: int = 1) -> bool:
        """Count it; whether it is new in this round, and so was said."""
        self.count(device, code, number)
        if place != self._in:
            self._in = place
            self._said.clear()
        if (device, code) in self._said or (device not in self._members and len(self._said) >= MAX_KEYS):
            return False
        self._said.add((device, code))
        self._news.warning(f"{text} (said once in a round)", device=device, code=code)
        return True

    def sum_up(self, place: Place) -> None:
        """Say and store what was counted since the last time."""
        if not self._counts:
            return
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for (device, code), number in self._counts.items():
            found[device][code] = number
        self._counts.clear()
        self._news.complaints(*place, found)
        changed = [device for device in found if device in self._members]
        for device in changed:
            self._totals[device] = self._totals.get(device, Counter()) + found[device]
        self._store.note_complaints({device: self._totals[device] for device in changed})
