"""What the server must not forget, in SQLite or PostgreSQL."""

from __future__ import annotations

from lwfed.cloud_server.store.figures import Contributed, StageFigures
from lwfed.cloud_server.store.opening import FILE_NAME, TIE_NAME, Tie, bind_folder, open_store, stored_runs
from lwfed.cloud_server.store.records import Contribution, Device, Judgement, Scores
from lwfed.cloud_server.store.step import Step
from lwfed.cloud_server.store.store import Begun, Store, new_id

__all__ = [
    "FILE_NAME",
    "TIE_NAME",
    "Begun",
    "Contributed",
    "Contribution",
    "Device",
    "Judgement",
    "Scores",
    "StageFigures",
    "Step",
    "Store",
    "Tie",
    "bind_folder",
    "new_id",
    "open_store",
    "stored_runs",
]
