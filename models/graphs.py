"""Graphs for ONNX Runtime, made once: by the server for a run, and by who measures without a server. `lwfed.models.prefix` runs them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

from lwfed.child import describe_exit
from lwfed.config import ModelSection
from lwfed.errors import MissingDependency
from lwfed.models.vit import EPS
from lwfed.plan import GraphEngine

MAKER = "lwfed.models.onnx_file"
MADE_WITHIN_S = 60.0


def make_graphs(model: ModelSection, engines: Collection[GraphEngine], folder: Path) -> dict[GraphEngine, Path]:
    """A file in `folder` for each of `engines`. Raises MissingDependency without a package onnx that works."""
    if not engines:
        return {}
    if find_spec("onnx") is None:
        raise MissingDependency("graphs for ONNX Runtime need the package onnx: pip install 'onnx>=1.17'")
    files = {engine: folder / f"{engine}.onnx" for engine in engines}
    shape = (model.width, model.heads, int(model.width * model.mlp_ratio), EPS)
    command = [sys.executable, "-m", MAKER, *map(str, shape), *(f"{engine}={file}" for engine, file in files.items())]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=MADE_WITHIN_S)
    except subprocess.CalledProcessError as error:
        problem = (error.stderr.strip().splitlines() or [describe_exit(error.returncode)])[-1]
    except subprocess.TimeoutExpired:
        problem = f"not within {MADE_WITHIN_S:g} s"
    else:
        return files
    raise MissingDependency(f"graphs for ONNX Runtime cannot be made ({problem}): pip install --upgrade 'onnx>=1.17'")
