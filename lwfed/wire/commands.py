"""What a state machine wants done to its connection. The machines return commands; shells execute them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Send:
    topic: str
    payload: bytes
    retain: bool = False


@dataclass(frozen=True)
class Subscribe:
    filter: str


@dataclass(frozen=True)
class Unsubscribe:
    filter: str


@dataclass(frozen=True)
class Reconnect:
    """The connection looks alive but nothing answers: a half-open link is noticed by TCP only after minutes."""

    reason: str


Command = Send | Subscribe | Unsubscribe | Reconnect
