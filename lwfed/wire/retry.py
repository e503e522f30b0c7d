"""When to repeat a question that nobody answers. Both transfer machines on a device ask by it."""

from __future__ import annotations

from random import Random

RECONNECT_EVERY_S = 60.0
LONGEST_PATIENCE_S = 1800.0  # with a link over which nothing moves: long enough for 120 KiB at 70 bytes a second
SUSPECT_S = 30.0  # a server that a thousand devices ask at once may take seconds, and a new connection asks it once more


class Retry:
    """Waits `first_s` for an answer, then twice as long each time, up to `longest_s`; each wait is jittered by a quarter.

    Devices that lose their server at the same moment must not come back in step. Times are seconds of the caller's clock.
    """

    def __init__(self, random: Random, first_s: float, longest_s: float = 60.0) -> None:
        self._random = random
        self._first_s = first_s
        self._longest_s = longest_s
        self._wait_s = self._asked_s = first_s  # after the next question, and after the last one
        self._unanswered = 0
        self._since = 0.0  # when the first of those was asked
        self._last_reconnect = float("-inf")
        self.due: float | None = None  # when to ask next

    def now(self) -> None:
        """Ask at the next opportunity, as if for the first time; what went unanswered before is forgotten."""
        self.answered()
        self.due = float("-inf")

    def at(self, when: float) -> None:
        self.due = when

    def stop(self) -> None:
        self.answered()
        self.due = None

    def is_due(self, now: float) -> bool:
        return self.due is not None and now >= self.due

    def asked(self, now: float) -> None:
        self._since = self._since if self._unanswered else now
        self._unanswered += 1
        self._asked_s = self._wait_s
        self.due = now + self._wait_s * self._random.uniform(0.75, 1.25)
        self._wait_s = min(2 * self._wait_s, self._longest_s)

    def left(self, now: float) -> None:
        """What was asked has left only now, so that its answer is to be waited for from now on."""
        if self._unanswered == 1:
            self._since = now
        if self.due is not None:
            self.due = max(self.due, now + self._asked_s * self._random.uniform(0.75, 1.25))

    def answered(self) -> None:
        self._unanswered = 0
        self._wait_s = self._first_s

    def wait(self, now: float) -> None:
        """Something came; ask again only when nothing more does for the first wait."""
        self.answered()
        self.due = now + self._first_s * self._random.uniform(0.75, 1.25)

    def wait_longer(self, now: float) -> None:
        """Something came, but not the answer, which is on its way behind it: do not ask again in the same rhythm."""
        self._unanswered = 0
        self.due = now + self._wait_s * self._random.uniform(0.75, 1.25)

    def suspect(self, now: float, patience_s: float = SUSPECT_S) -> bool:
        """Whether the connection deserves to be made anew: no answer in so long to two questions or more, at most once a minute."""
        if self._unanswered < 2 or now - self._since < patience_s or now - self._last_reconnect < RECONNECT_EVERY_S:
            return False
        self._last_reconnect = now
        return True
