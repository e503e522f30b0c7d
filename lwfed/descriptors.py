"""How many files and connections a process may have open at once."""

from __future__ import annotations

import resource

ENOUGH = 65_536  # some systems allow a billion, and programs make tables as large as they may


def raise_limit() -> None:
    """For this process and those that it starts, where it may: often it is 1024 unless asked for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
