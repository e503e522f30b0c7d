"""Which devices train in a round: a function of seed, stage, round and who is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lwfed.cloud_server.notices import Joined, Notice
from lwfed.cloud_server.rounds import Rules, State
from lwfed.seeds import derive


def ranked(seed: int, stage: int, round: int, participants: Iterable[int]) -> list[int]:
    """The participants in this round's random order.

    Each has a place of its own in it: whether others are there changes neither its draw nor that of anybody else.
    """
    return sorted(set(participants), key=lambda participant: (derive(seed, "sample", stage, round, participant), participant))


def sample(seed: int, stage: int, round: int, participants: Iterable[int], count: int | None) -> tuple[int, ...]:
    """`count` of the participants, or all of them, in ascending order."""
    return tuple(sorted(ranked(seed, stage, round, participants)[:count]))


def free(rules: Rules, state: State) -> list[int]:
    """Devices that are there and not chosen, those to ask first in front."""
    chosen = set(state.chosen)
    return [one for one in ranked(rules.seed, state.stage, state.round, state.here) if one not in chosen]


def assign_more(rules: Rules, state: State, now: float, overdue: bool = False) -> tuple[State, list[Notice]]:
    """Choose further devices when those chosen can no longer make a quorum; with `overdue` who has not answered does not count."""
    lacking = state.needed - len(state.contributed) - (0 if overdue else len(state.expected))
    extra = tuple(free(rules, state)[:lacking]) if lacking > 0 else ()
    if not extra:
        return state, []
    chosen, asked = tuple(sorted((*state.chosen, *extra))), {**state.asked, **dict.fromkeys(extra, now)}
    return replace(state, chosen=chosen, asked=asked), [Joined(extra)]
