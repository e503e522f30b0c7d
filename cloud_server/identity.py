"""Whether a stored run may go on under the configuration that it is served with now."""

from __future__ import annotations

from pathlib import Path

from lwfed.config import RunConfig
from lwfed.config.explain import keys
from lwfed.errors import StateError

OPERATION = ("rounds", "transfer", "worker")  # sections that say how a run proceeds; the others say what it learns
LEARNING = ("transfer.codec", "transfer.top_k")  # keys of such a section that say what is learnt nevertheless
SHOWN = 12


def accept(root: Path, stored: RunConfig, wanted: RunConfig) -> list[str]:
    """What has changed, a line a key, where the run can go on with it; raises StateError where it would be another run."""
    old, new = stored.model_dump(mode="json"), wanted.model_dump(mode="json")
    changed = {}
    for key in keys(RunConfig):
        section, _, name = key.partition(".")
        if old[section][name] != new[section][name]:
            changed[key] = f"{key}: {old[section][name]} before, {new[section][name]} now"
    foreign = [text for key, text in changed.items() if key.partition(".")[0] not in OPERATION or key in LEARNING]
    if not foreign:
        return list(changed.values())
    more = [f"and {len(foreign) - SHOWN} more"] if len(foreign) > SHOWN else []
    raise StateError(
        f"{root} holds run {stored.run.name!r} of another configuration:\n"
        + "\n".join(f"  {text}" for text in foreign[:SHOWN] + more)
        + "\ngo on with the old settings, or begin a new run with another --state (of a simulation: --out) or --set run.name=NAME; "
        + f"only {', '.join(OPERATION)} may change within a run, and of transfer not codec and top_k"
    )
