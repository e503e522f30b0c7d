"""What a measurement trains on, and what the formulas say of it: ``python -m lwfed.edge_agent.profiling.sample``.

In:   {"config": file, "stage", "images": count, "folder"}, one line of JSON
Out:  {"parts": {part: file}, "graphs": {engine: file}, "no_graphs": why they could not be made, or null,
       "data": file, "bytes_down", "bytes_up", "macs"}

Images are seeded noise, which is honest for time and memory: neither depends on what the pixels show. Bytes are those of
the files that travel in a round; `macs` are multiply-accumulates of one optimiser step. A process of its own, for torch. It ends
with the exit code of StateError where the folder does not take its files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lwfed.config import RunConfig
from lwfed.errors import MissingDependency, StateError
from lwfed.models.cost import true_macs
from lwfed.models.graphs import make_graphs
from lwfed.models.initial import init_part
from lwfed.models.measure import measure
from lwfed.seeds import derive
from lwfed.wire import tensors as wire


def make_sample(config: RunConfig, stage: int, images: int, folder: Path) -> dict[str, Any]:
    """Write model and images of `stage`; the answer."""
    plan, model = config.plan(stage), config.model
    parts = {}
    for part in plan.present:
        parts[part] = folder / part
        parts[part].write_bytes(wire.encode({name: tensor.numpy() for name, tensor in init_part(config, part).items()}))
    random = np.random.default_rng(derive(config.run.seed, "sample"))
    shape = (images, model.image_size, model.image_size, *([3] if model.channels == 3 else []))
    data = folder / "images.npz"
    np.savez(data, train_images=random.integers(0, 256, shape, dtype=np.uint8))

    graphs, no_graphs = {}, None
    try:
        graphs = make_graphs(model, config.graphs if plan.frozen_layers else (), folder)
    except MissingDependency as error:
        no_graphs = str(error)

    def size(names: tuple[str, ...]) -> int:
        return sum(parts[name].stat().st_size for name in names)

    return {
        "parts": {part: str(file) for part, file in parts.items()},
        "graphs": {engine: str(file) for engine, file in graphs.items()},
        "no_graphs": no_graphs,
        "data": str(data),
        "bytes_down": size(plan.downloaded),
        "bytes_up": size(plan.uploaded),
        "macs": true_macs(config, plan, measure(config)) * config.train.batch_size,
    }


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
