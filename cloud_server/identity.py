"""Whether a stored run may go on under the configuration that it is served with now."""

from __future__ import annotations

from pathlib import Path

from lwfed.config import RunConfig
from lwfed.config.learning import OPERATION, learns, values
from lwfed.errors import StateError

SHOWN = 12


def accept(root: Path, stored: RunConfig, wanted: RunConfig) -> list[str]:
    """What has changed, a line a key, where the run can go on with it; raises StateError where it would be another run."""
    old, new = values(stored), values(wanted)
    changed = {key: f"{key}: {old[key]} before, {new[key]} now" for key in old if old[key] != new[key]}
    foreign = [text for key, text in changed.items() if learns(key)]
    if not foreign:
        return list(changed.values())
    more = [f"and {len(foreign) - SHOWN} more"] if len(foreign) > SHOWN else []
    raise StateError(
        f"{root} holds run {stored.run.name!r} of another configuration:\n"
        + "\n".join(f"  {text}" for text in foreign[:SHOWN] + more)
        + "\ngo on with the old settings, or begin a new run with another --state (of a simulation: --out) or --set run.name=NAME; "
        + f"only {', '.join(OPERATION)} may change within a run, and of transfer not codec and top_k"
    )
