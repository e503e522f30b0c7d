"""What a report says of the machine that it was made on."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from lwfed.errors import MissingDependency


def machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(),
        "memory_mb": round(psutil.virtual_memory().total / 1e6),
        "system": f"{platform.system()} {platform.machine()}",
        "accelerator": _accelerator(),
        "python": platform.python_version(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {name: version(name) for name in packages}


def needed(module: str, what: str) -> Any:
    """`module`, imported before anything runs: `what` must not fail at its end for want of a package. Raises MissingDependency."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingDependency(f"{what} needs {error.name}: pip install 'lwfed[demo]'") from None


def _accelerator() -> str | None:
    """Name of the first CUDA device, as its driver tells it."""
    try:
        words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        lines = subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.machine()
