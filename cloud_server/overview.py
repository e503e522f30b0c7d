"""Looking into a run's folder from outside, also while its server is at work."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from lwfed.cloud_server import checkpoint, orders
from lwfed.cloud_server.course import MODEL_FOLDER
from lwfed.cloud_server.news import NAMES, codes_of, judgement
from lwfed.cloud_server.status import Admissions, Status, begun
from lwfed.cloud_server.store import FILE_NAME, TIE_NAME, Tie, stored_runs
from lwfed.cloud_server.telling import stop_reason
from lwfed.console import counted, printable
from lwfed.errors import StateError

SHOWN_ROUNDS = 20  # of a stage
GATED = Path("broker", "permissions.json")  # of a run that was served to devices of other machines
Line = tuple[str, str]  # label, text


def runs_below(folder: Path) -> list[Path]:
    """The folders of runs. Raises StateError when there is none."""
    found = sorted({path.parent for name in (FILE_NAME, TIE_NAME) for path in folder.glob(f"*/{name}")})
    if not found:
        raise StateError(f"there is no run in {folder}: begin one with `cloud-server serve --config demo`, or give its --state")
    return found


def only_run(folder: Path) -> Path:
    """The folder of the one run there is. Raises StateError when there is none, or several."""
    found = runs_below(folder)
    if len(found) > 1:
        raise StateError(f"{folder} has several runs ({', '.join(root.name for root in found)}): say with --state which one")
    return found[0]


def overview(root: Path, database: str | None = None, admissions: Admissions | None = None, as_json: bool = False) -> str:
    """Where the run below `root` stands, as a few aligned lines, or one of JSON. Raises StateError when there is none."""
    if database is None and (tie := Tie.of(root)):
        if as_json:
            return json.dumps({"run": tie.run, "where": str(root), "database": tie.database})
        return f"{'run':<12}{tie.run}, of {root}, is kept in {tie.database}: add its --database"
    with stored_runs(root, database) as (store,):
        admitted = admissions if (root / GATED).is_file() else None
        return _shown(Status.of(store, str(root), len(orders.waiting(root)), admitted), as_json)


def overviews(database: str, as_json: bool = False) -> list[str]:
    """Of all runs in a database. Raises StateError when there is none."""
    with stored_runs(None, database) as stores:
        return [_shown(Status.of(store, store.database.name), as_json) for store in stores]


def _shown(status: Status, as_json: bool) -> str:
    if as_json:
        return json.dumps(asdict(status))
    lines = [*_course_lines(status), *_device_lines(status), *_admission_lines(status.admissions), *_result_lines(status)]
    return "\n".join(f"{label:<12}{printable(text)}" for label, text in lines)


def _course_lines(status: Status) -> Iterator[Line]:
    yield "run", f"{status.run} ({status.strategy}), in {status.where}"
    yield "now", f"stage {status.stage} of {status.stages}, round {status.round} of {status.last_round}, {status.phase}"
    if status.paused:
        until = f"until {orders.to_go_on(status.where if status.where != status.database else 'FOLDER', status.database is not None)}"
        yield "paused", f"after this round, {until}" if status.phase == "training" else f"no round begins {until}"
    if status.stopped:
        yield "stopped", status.stopped
    if not status.served:
        yield "server", "no server is running; devices as last seen"
    if status.orders:
        wait = f"{counted(status.orders, 'order')} wait{'s' if status.orders == 1 else ''}"
        yield "ordered", f"{wait} for the server to look or be started"
    if status.phase == "training":
        yield "round", f"{status.contributed} of {status.chosen} updates, {status.needed} needed"


def _device_lines(status: Status) -> Iterator[Line]:
    for device in status.devices:
        there = f"{'' if status.served or device.presence == 'revoked' else 'was '}{device.presence}"
        text = f"{there}; {device.device}, {device.machine}, last greeting {_minute(device.seen_s)}"
        if device.left_out:
            text += f"; left out of {counted(device.left_out, 'round')}"
        if device.doubled_s is not None:
            text += f"; two agents were this device at {_minute(device.doubled_s)}: end one and delete its --state"
        if device.complaints:
            text += f"; complaints: {codes_of(device.complaints)}"
        yield f"device {device.participant}", text


def _admission_lines(admissions: Admissions | None) -> Iterator[Line]:
    if admissions is None:
        return
    now_s = time.time()
    invited = [
        f"{name} (its token {'is good until' if expires_s > now_s else 'expired'} {_minute(expires_s)})"
        for name, expires_s in admissions.invited.items()
    ]
    revoked = [f"{name} ({_minute(when_s)})" for name, when_s in admissions.revoked.items()]
    yield from ((label, ", ".join(names)) for label, names in (("invited", invited), ("revoked", revoked)) if names)


def _result_lines(status: Status) -> Iterator[Line]:
    for one in status.scores:
        probe = "" if one.probe is None else f", linear probe {one.probe:.1%}"
        yield f"stage {one.stage}" if one.stage else "before", f"{NAMES[one.name]}: kNN {one.knn:.1%}{probe}"
    for found in status.judgements:
        again = "" if found.attempt == 1 else f", attempt {found.attempt}"
        yield f"stage {found.stage}", f"features{again}: {judgement(found)}"
    for stage, rounds in groupby(status.rounds, lambda one: one.stage):
        last = list(rounds)[-SHOWN_ROUNDS:]
        if any(one.left_out for one in last):
            numbers = ", ".join(f"{len(one.left_out)} of {one.updates}" for one in last)
            yield "left out", f"stage {stage}, updates from round {last[0].round} on: {numbers}"
    if status.rounds:
        yield "last round", f"stage {status.rounds[-1].stage}, round {status.rounds[-1].round}: loss {status.loss:.4f}"


def order(root: Path, what: orders.Order, database: str | None = None) -> bool:
    """Give the run below `root` an order; whether a server is there to do it now. Raises StateError."""
    with stored_runs(root, database) as (store,):
        config = begun(store)
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
        config, state = begun(store), store.state
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
