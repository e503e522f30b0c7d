"""Where a run stands, by its store: what `cloud-server status` tells people and, as JSON, other programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from lwfed.cloud_server.registry import Registry
from lwfed.cloud_server.rounds import Rules, State
from lwfed.cloud_server.store import Judgement, Store
from lwfed.cloud_server.telling import stop_reason
from lwfed.config import RunConfig
from lwfed.wire.messages import Phase


@dataclass(frozen=True)
class Admissions:
    """Who may come to the server of `serve --listen`, beside those that have enrolled."""

    invited: Mapping[str, float]  # name -> when its token expires, Unix time
    revoked: Mapping[str, float]  # name -> when it was

    @classmethod
    def of(cls, registry: Registry) -> Admissions:
        devices = registry.devices()
        revoked = {one.name: one.revoked_s for one in devices if one.revoked_s is not None}
        return cls({one.name: one.expires_s for one in devices if one.invited}, revoked)


@dataclass(frozen=True)
class DeviceStatus:
    participant: int
    device: str
    presence: str  # here | away | gone, as last seen; or revoked
    machine: str
    seen_s: float  # Unix times
    doubled_s: float | None
    complaints: Mapping[str, int]  # code -> how often, over the run
    left_out: int  # rounds in which the rule of aggregation did not choose its update


@dataclass(frozen=True)
class RoundStatus:
    """A round that is closed."""

    stage: int
    round: int
    updates: int
    left_out: tuple[int, ...]  # participants among them that the rule of aggregation did not choose


@dataclass(frozen=True)
class EvaluationStatus:
    stage: int  # 0: before the first one
    name: str  # random | raw_pixels | trained
    knn: float  # accuracy
    probe: float | None


@dataclass(frozen=True)
class JudgementStatus(Judgement):
    stage: int
    attempt: int


@dataclass(frozen=True)
class Status:
    run: str
    id: str  # by which devices know it
    strategy: str
    where: str  # its folder, or the database where that is not known
    database: str | None  # None: its records are in its folder
    served: bool
    phase: Phase
    stage: int
    stages: int
    round: int
    last_round: int  # of the stage, as planned
    paused: bool
    stopped: str | None  # why
    orders: int  # that wait for the server
    chosen: int  # in the round under way
    contributed: int
    needed: int
    devices: tuple[DeviceStatus, ...]
    scores: tuple[EvaluationStatus, ...]
    judgements: tuple[JudgementStatus, ...]
    rounds: tuple[RoundStatus, ...]
    loss: float | None  # of the last of them
    admissions: Admissions | None  # None: not a run of `serve --listen`

    @classmethod
    def of(cls, store: Store, where: str, orders: int = 0, admissions: Admissions | None = None) -> Status:
        config, state = begun(store), store.state
        rules, rounds = Rules.of(config), _rounds(store)
        return cls(
            run=config.run.name,
            id=store.id,
            strategy=config.stages.strategy,
            where=where,
            database=None if store.database.path else store.database.name,
            served=store.served,
            phase=state.phase,
            stage=state.stage,
            stages=rules.stages,
            round=state.round,
            last_round=rules.last_round(state.stage, state.round),
            paused=state.paused and not state.over,
            stopped=stop_reason(state) if state.phase == "stopped" else None,
            orders=orders,
            chosen=len(state.chosen),
            contributed=len(state.contributed),
            needed=state.needed,
            devices=_devices(store, state, rounds, admissions.revoked if admissions else {}),
            scores=tuple(EvaluationStatus(*place, one.knn, one.probe) for place, one in store.scores().items()),
            judgements=tuple(JudgementStatus(**vars(one), stage=place[0], attempt=place[1]) for place, one in store.judgements().items()),
            rounds=rounds,
            loss=store.loss(rounds[-1].stage, rounds[-1].round) if rounds else None,
            admissions=admissions,
        )


def begun(store: Store) -> RunConfig:
    config = store.config
    assert config is not None  # or it would not be in the store
    return config


def _rounds(store: Store) -> tuple[RoundStatus, ...]:
    closed = [row for row in store.rounds() if row.closed_s is not None]
    contributed = store.contributed()  # after them: a server at work may close a round in between
    return tuple(RoundStatus(row.stage, row.round, contributed[row.stage, row.round].devices, tuple(row.left_out)) for row in closed)


def _devices(store: Store, state: State, rounds: tuple[RoundStatus, ...], revoked: Collection[str]) -> tuple[DeviceStatus, ...]:
    left_out = Counter(participant for one in rounds for participant in one.left_out)
    return tuple(
        DeviceStatus(
            participant=one.participant,
            device=one.id,
            presence="revoked" if one.id in revoked else state.devices.get(one.participant, "gone"),
            machine=one.hello.machine,
            seen_s=one.seen_s,
            doubled_s=one.doubled_s,
            complaints=one.complaints,
            left_out=left_out[one.participant],
        )
        for one in store.devices()
    )
