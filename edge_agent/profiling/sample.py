"""What a measurement trains on, and what the formulas say of it: ``python -m lwfed.edge_agent.profiling.sample``.

In:   {"config": file, "stage", "images": count, "folder"}, one line of JSON
Out:  {"parts": {part: file}, "graphs": {engine: file}, "no_graphs": why they could not be made, or null,
       "data": file, "bytes_down", "bytes_up", "macs"}

Images are seeded noise, which is honest for time and memory: neither depends on what the pixels show. Bytes are those of
the files that travel in a round, encoded as agent and server encode theirs. What the round changes is seeded noise as well, of
which the codecs make about as many bytes as of real changes. `macs` are multiply-accumulates of one optimiser step. A process of
its own, for torch. It ends with the exit code of StateError where the folder does not take its files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lwfed.config import RunConfig
from lwfed.edge_agent import differences
from lwfed.edge_agent.previous import Turn
from lwfed.errors import MissingDependency, StateError
from lwfed.models.cost import true_macs
from lwfed.models.graphs import make_graphs
from lwfed.models.initial import init_part
from lwfed.models.measure import measure
from lwfed.plan import StagePlan
from lwfed.seeds import derive
from lwfed.wire import deltas
from lwfed.wire import tensors as wire

CHANGE = np.float32(1e-3)  # standard deviation of what a round changes: its scale alone hardly matters


def make_sample(config: RunConfig, stage: int, images: int, folder: Path) -> dict[str, Any]:
    """Write model and images of `stage`; the answer."""
    plan, model = config.plan(stage), config.model
    parts, weights = {part: folder / part for part in plan.present}, {}
    for part, file in parts.items():
        weights[part] = {name: tensor.numpy() for name, tensor in init_part(config, part).items()}
        file.write_bytes(wire.encode(weights[part]))
    random = np.random.default_rng(derive(config.run.seed, "sample"))
    shape = (images, model.image_size, model.image_size, *([3] if model.channels == 3 else []))
    data = folder / "images.npz"
    np.savez(data, train_images=random.integers(0, 256, shape, dtype=np.uint8))
    graphs, no_graphs = {}, None
    try:
        graphs = make_graphs(model, config.graphs if plan.frozen_layers else (), folder)
    except MissingDependency as error:
        no_graphs = str(error)
    down, up = round_bytes(config, plan, weights, folder)
    return {
        "parts": {part: str(file) for part, file in parts.items()},
        "graphs": {engine: str(file) for engine, file in graphs.items()},
        "no_graphs": no_graphs,
        "data": str(data),
        "bytes_down": down,
        "bytes_up": up,
        "macs": true_macs(config, plan, measure(config)) * config.train.batch_size,
    }


def round_bytes(config: RunConfig, plan: StagePlan, weights: Mapping[str, Mapping[str, wire.Array]], folder: Path) -> tuple[int, int]:
    """(down, up) for a device that was in the round before; `weights`: part -> its tensors."""
    random = np.random.default_rng(derive(config.run.seed, "sample", "change"))
    changes: dict[str, dict[str, wire.Array]] = {}
    for part in plan.present:
        tensors = weights[part].items()
        changes[part] = {name: CHANGE * random.standard_normal(tensor.shape, np.float32) for name, tensor in tensors}
    received = {name: tensor for part in plan.uploaded for name, tensor in weights[part].items()}
    update = {name: received[name] + change for part in plan.uploaded for name, change in changes[part].items()}
    turn, codec = Turn(plan.stage, 1, 0, after=None), config.transfer.codec
    sent = differences.encode(config, turn, update, received, folder, sys.stderr.write)
    if codec == "fp32":
        return sum(len(wire.encode(weights[part])) for part in plan.downloaded), len(sent)
    patches = (deltas.encode(changes[part], codec, 1.0, config.run.seed).data for part in plan.downloaded)
    return sum(map(len, patches)), len(sent)


def main() -> None:
    order = json.load(sys.stdin)
    config = RunConfig.from_bytes(Path(order["config"]).read_bytes())
    try:
        made = make_sample(config, order["stage"], order["images"], Path(order["folder"]))
    except OSError as error:
        sys.stderr.write(error.strerror or str(error))
        sys.exit(StateError.exit_code)
    sys.stdout.write(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
