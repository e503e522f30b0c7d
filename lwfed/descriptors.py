"""How many files and connections a process may have open at once."""

from __future__ import annotations

import resource


def raise_limit() -> None:
    """To what this process may have at most, for it and those that it starts: often 1024 unless asked for."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))
