"""The server's worker: ``python -m lwfed.cloud_server.worker``, driven by JSON lines (`lwfed.child`).

In:   {"do": "aggregate", "config", "parts": {part: file}, as devices received those that they upload, "out": folder,
                          "updates": [[participant, images, file]], "lost": [participant]}
      {"do": "prepare",   "config", "stage", "attempt", "parts", "graphs": [engine], "out"}
      {"do": "calibrate", "config", "stage", "round", "lr_scale", "parts", "kept": folder, "out"}
      {"do": "evaluate",  "config", "names": [random | raw_pixels | trained], "parts", "kept"}     trained: its variety too
Out:  {"event": "ready"}                                       once
      {"event": "aggregated", and the fields of `Merged`}
      {"event": "prepared", "parts": {part: file},             the parts that the stage adds
                            "shapes": {part: {tensor: shape}}, of all parts that the run will ever have
                            "graphs": {engine: file}, "no_graphs": why they could not be made, or null}
      {"event": "calibrated", "parts", "loss", "seconds"}      the parts that were trained; the loss of the last epoch
      {"event": "evaluated", "scores": {name: {"knn", "probe"}},   figures of models.evaluation.metrics, or null; none without labels
                             "variety": {"spread", "rank", "collapsed"}, or null}

Torch is imported with the first job that needs it: rounds without calibration are aggregated in a process without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lwfed.child import Json, serve
from lwfed.cloud_server.merge import merge
from lwfed.config import RunConfig

if TYPE_CHECKING:
    from lwfed.cloud_server.torch_jobs import TorchJobs

Say = Callable[[Json], None]


class Worker:
    def handle(self, data: Json, say: Say) -> None:
        config = RunConfig.from_bytes(Path(data["config"]).read_bytes())
        say({"event": "aggregated", **asdict(merge(config, data))} if data["do"] == "aggregate" else self._jobs.do(config, data))

    @cached_property
    def _jobs(self) -> TorchJobs:
        from lwfed.cloud_server.torch_jobs import TorchJobs

        return TorchJobs()


def main() -> None:
    serve(Worker().handle, {"event": "ready"})


if __name__ == "__main__":
    main()
