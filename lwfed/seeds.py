"""Every random stream of a run, derived from one seed and from what the stream is for.

Two streams with different labels are independent; the same labels give the same stream on every
machine, so a round that is repeated after a crash draws the same numbers.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, purpose: str, *labels: int | str) -> int:
    """A seed in [0, 2**63) for `purpose`, e.g. ``derive(0, "views", participant, stage, round)``."""
    text = "\x1f".join([str(seed), purpose, *(str(label) for label in labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
