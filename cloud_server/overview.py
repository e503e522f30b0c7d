"""Looking into a run's folder from outside, also while its server is at work."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from lwfed.cloud_server import checkpoint, orders
from lwfed.cloud_server.course import MODEL_FOLDER
from lwfed.cloud_server.news import NAMES, codes_of, judgement
from lwfed.cloud_server.rounds import Rules
from lwfed.cloud_server.store import FILE_NAME, TIE_NAME, Store, Tie, stored_runs
from lwfed.cloud_server.telling import stop_reason
from lwfed.config import RunConfig
from lwfed.console import counted, printable
from lwfed.errors import StateError


def runs_below(folder: Path) -> list[Path]:
    """The folders of runs. Raises StateError when there is none."""
    found = sorted({path.parent for name in (FILE_NAME, TIE_NAME) for path in folder.glob(f"*/{name}")})
    if not found:
        raise StateError(f"there is no run in {folder}: begin one with `cloud-server serve --config demo`, or give its --state")
    return found


def overview(root: Path, database: str | None = None) -> str:
    """Where the run below `root` stands, as a few aligned lines. Raises StateError when there is none."""
    if database is None and (tie := Tie.of(root)):
        return f"{'run':<12}{tie.run}, of {root}, is kept in {tie.database}: add its --database"
    with stored_runs(root, database) as (store,):
        return _overview(store, str(root), len(orders.waiting(root)))


def overviews(database: str) -> list[str]:
    """Of all runs in a database. Raises StateError when there is none."""
    with stored_runs(None, database) as stores:
        return [_overview(store, store.database.name) for store in stores]


def _overview(store: Store, where: str, ordered: int = 0) -> str:
    config, state = _begun(store), store.state
    rules = Rules.of(config)
    planned = rules.last_round(state.stage, state.round)
    lines = [
        ("run", f"{config.run.name} ({config.stages.strategy}), in {where}"),
        ("now", f"stage {state.stage} of {rules.stages}, round {state.round} of {planned}, {state.phase}"),
    ]
    if state.paused and not state.over:
        until = f"until cloud-server resume --state {where}"
        lines.append(("paused", f"after this round, {until}" if state.phase == "training" else f"no round begins {until}"))
    if state.phase == "stopped":
        lines.append(("stopped", stop_reason(state)))
    running = store.served
    if not running:
        lines.append(("server", "no server is running; devices as last seen"))
    if ordered:
        lines.append(("ordered", f"{counted(ordered, 'order')} wait{'s' if ordered == 1 else ''} for the server to look or be started"))
    if state.phase == "training":
        lines.append(("round", f"{len(state.contributed)} of {len(state.chosen)} updates, {state.needed} needed"))
    for device in store.devices():
        there = state.devices.get(device.participant, "gone")
        text = f"{'' if running else 'was '}{there}; {device.id}, {device.hello.machine}, last greeting {_minute(device.seen_s)}"
        if device.doubled_s is not None:
            text += f"; two agents were this device at {_minute(device.doubled_s)}: end one and delete its --state"
        if device.complaints:
            text += f"; complaints: {codes_of(device.complaints)}"
        lines.append((f"device {device.participant}", text))
    for (stage, name), scores in store.scores().items():
        probe = "" if scores.probe is None else f", linear probe {scores.probe:.1%}"
        lines.append((f"stage {stage}" if stage else "before", f"{NAMES[name]}: kNN {scores.knn:.1%}{probe}"))
    for (stage, attempt), found in store.judgements().items():
        again = "" if attempt == 1 else f", attempt {attempt}"
        lines.append((f"stage {stage}", f"features{again}: {judgement(found)}"))
    closed = [row for row in store.rounds() if row.closed_s is not None]
    if closed:
        loss = store.loss(closed[-1].stage, closed[-1].round)
        lines.append(("last round", f"stage {closed[-1].stage}, round {closed[-1].round}: loss {loss:.4f}"))
    return "\n".join(f"{label:<12}{printable(text)}" for label, text in lines)


def order(root: Path, what: orders.Order, database: str | None = None) -> bool:
    """Give the run below `root` an order; whether a server is there to do it now. Raises StateError."""
    with stored_runs(root, database) as (store,):
        config = _begun(store)
        if store.state.over:
            raise StateError(f"run {config.run.name} is {store.state.phase}: there is nothing to {what.do}")
        running = store.served
    orders.give(root, what)
    return running


def export_from(root: Path, out: Path, stage: int | None, database: str | None = None) -> int:
    """Write the encoder of the newest checkpoint, or of the last one of `stage`; returns its stage.

    What collapsed and stopped a run is written only when asked for by its stage.
    """
    with stored_runs(root, database) as (store,):
        config, state = _begun(store), store.state
        if stage is None and state.phase == "stopped":
            stage = state.sound_stage
            if not stage:
                raise StateError(f"{stop_reason(state)}, and there is none before it; --stage {state.stage} writes it all the same")
        found, parts = checkpoint.choose(store.checkpoints(), stage)
        checkpoint.export(config, found, parts, lambda blob: _intact(root / MODEL_FOLDER / blob), out)
    return found


def _intact(path: Path) -> Path:
    """The file of a blob. Not through a BlobStore: opening one tidies up, and its server may be at work in there."""
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
        raise StateError(f"{path} is missing or damaged; if the run is going on, try again")
    return path


def _minute(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def _begun(store: Store) -> RunConfig:
    config = store.config
    assert config is not None  # or it would not be in the store
    return config
