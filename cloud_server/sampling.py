"""Which devices train in a round: a function of seed, stage, round and who is there."""

from __future__ import annotations

from collections.abc import Iterable

from lwfed.seeds import derive


def ranked(seed: int, stage: int, round: int, participants: Iterable[int]) -> list[int]:
    """The participants in this round's random order.

    Each has a place of its own in it: whether others are there changes neither its draw nor that of anybody else.
    """
    return sorted(set(participants), key=lambda participant: (derive(seed, "sample", stage, round, participant), participant))


def sample(seed: int, stage: int, round: int, participants: Iterable[int], count: int | None) -> tuple[int, ...]:
    """`count` of the participants, or all of them, in ascending order."""
    return tuple(sorted(ranked(seed, stage, round, participants)[:count]))
