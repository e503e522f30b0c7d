"""What `lwfed bench` measures: the same task done in several ways, each in processes of its own."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from lwfed.config import RunConfig, load_config
from lwfed.edge_agent.profiling import measure
from lwfed.edge_agent.profiling.measure import EPOCH_IMAGES, WARM_UP, DidNotFit, Measured, OnStep
from lwfed.errors import WorkerFailed
from lwfed.models.kernels import library
from lwfed.tools.bench import formulas
from lwfed.tools.bench.formulas import bytes_moved, whole
from lwfed.tools.bench.report import INTERRUPTED

STEPS = 3  # that count; of the baseline LEAST_STEPS where they take longer than ENOUGH_S
ENOUGH_S = 150.0
LEAST_STEPS = 2  # a single one may be that in which the machine did something else
QUICK_STEPS, QUICK_ENOUGH_S, QUICK_LEAST_STEPS = 2, 20.0, 1
ACCUMULATED = 32  # images, of the baseline that accumulates gradients
LIBRARIES_MB = 400.0  # Python, torch, torchvision and timm; for estimates
START_S = 12.0  # of a program with torch; for estimates
COMPILE_S = 300.0  # of torch.compile; for estimates
EFFICIENCY = 0.35  # of training, where a matrix product has 1; for estimates

BASELINES = ("published", "published_accumulated", "ours_end_to_end")  # ours is compared with the first that was measured


@dataclass(frozen=True)
class Row:
    name: str
    title: str
    config: RunConfig
    stages: tuple[int, ...]
    ours: bool  # the agent; else lwfed.models.end_to_end
    steps: int  # that count
    enough_s: float
    least_steps: int  # of the baseline, however slow
    accumulated: int | None = None
    compiled: bool = False
    kernels: bool = False  # ours, for matrix products of the baseline
    reason: str = ""  # why it is left out

    def macs(self, stage: int) -> float:
        """Multiply-accumulates of one optimiser step."""
        return formulas.macs(self.config, stage) if self.ours else formulas.published_macs(self.config, stage)

    def need_mb(self, stage: int) -> float:
        """Estimate of the peak."""
        return formulas.training_mb(self.config if self.ours else whole(self.config, self.accumulated), stage) + LIBRARIES_MB

    def measure(self, stage: int, on_step: OnStep) -> Measured:
        """Raises DidNotFit and WorkerFailed."""
        if not self.ours:
            return measure.published(
                self.config, stage, self.steps, on_step, self.enough_s, self.least_steps, self.accumulated, self.compiled, self.kernels
            )
        with measure.sampled(self.config, stage, self.steps) as sample:
            return measure.agent(self.config, sample, stage, on_step)


def make_rows(quick: bool) -> list[Row]:
    """ViT-Tiny on 32x32 images as in the paper, in one thread."""

    def configured(*settings: str) -> RunConfig:
        return load_config("base", [f"train.batch_size={128 if quick else 512}", "train.threads=1", "worker.device=cpu", *settings])

    staged, whole_model = configured(), configured("stages.strategy=end_to_end")
    published, naive = configured("stages.strategy=end_to_end", "transfer.codec=fp32"), configured("transfer.codec=fp32")
    exact, reused = configured("train.prefix=torch"), configured("train.views_per_round=1")
    last = staged.stage_count
    stages = (last,) if quick else tuple(range(1, last + 1))
    later = "only in the full run" if quick else ""
    compiler = "" if shutil.which("g++") or shutil.which("clang++") else "torch.compile needs a C++ compiler, and there is none"
    same = "" if library() == "onednn" else "ours are torch's on this machine"
    pace = (QUICK_STEPS, QUICK_ENOUGH_S, QUICK_LEAST_STEPS) if quick else (STEPS, ENOUGH_S, LEAST_STEPS)
    return [
        Row("published", "end to end as published code does it", published, (1,), False, *pace),
        Row("published_accumulated", f"the same, in pieces of {ACCUMULATED}", published, (1,), False, *pace, ACCUMULATED, reason=later),
        Row("published_kernels", "the same, with our matrix products", published, (1,), False, *pace, kernels=True, reason=later or same),
        Row("published_compiled", "the same, with torch.compile", published, (1,), False, *pace, compiled=True, reason=later or compiler),
        Row("naive", "layer-wise as published code would do it", naive, stages, False, *pace),
        Row("ours", "ours, layer-wise", staged, stages, True, *pace),
        Row("ours_torch", "ours, frozen layers in torch", exact, stages, True, *pace, reason=later),
        Row("ours_reused", "ours, one pair of views used again", reused, stages, True, *pace, reason=later),
        Row("ours_end_to_end", "ours, end to end", whole_model, (1,), True, *pace, reason=later),
    ]


def estimate_s(rows: list[Row]) -> float:
    """Seconds for all of them, by the speed of a matrix product on one thread."""
    torch.set_num_threads(1)
    a, b = torch.ones(512, 192), torch.ones(192, 768)
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < 0.3:
        a @ b
        count += 1
    speed = EFFICIENCY * count * 512 * 192 * 768 / passed

    def one(row: Row, stage: int) -> float:
        step = row.macs(stage) / speed
        counted = row.steps if row.ours else max(row.least_steps, min(row.steps, row.enough_s // step - WARM_UP))
        return (WARM_UP + counted) * step + START_S + COMPILE_S * row.compiled

    return sum(one(row, stage) for row in rows if not row.reason for stage in row.stages)


def blank(row: Row) -> dict[str, Any]:
    """The record of `row` before it is measured: interrupted, or left out."""
    about = {"name": row.name, "title": row.title, "strategy": row.config.stages.strategy, "batch_size": row.config.train.batch_size}
    return {**about, "reason": row.reason or INTERRUPTED, "stages": []}


def measure_row(row: Row, record: dict[str, Any], on_step: Callable[[int, int, int], None]) -> None:
    """Fill the blank `record` of `row`, stage by stage; its `reason` is why it has not all of them. `on_step` hears stage, step, steps."""
    if not row.reason:
        record["reason"] = _measure_stages(row, record["stages"], on_step)


def _measure_stages(row: Row, records: list[dict[str, Any]], on_step: Callable[[int, int, int], None]) -> str:
    """Add their records; returns why not of all, empty where it is of all."""
    for stage in row.stages:
        available = psutil.virtual_memory().available / 1e6
        if (need := row.need_mb(stage)) > available:
            return f"it takes about {need:.0f} MB, and {available:.0f} MB are available"
        try:
            found = row.measure(stage, lambda step, steps, stage=stage: on_step(stage, step, steps))  # type: ignore[misc]
        except DidNotFit as problem:
            return f"it did not fit into memory: {problem}"
        except WorkerFailed as problem:  # what the other rows have taken hours for is not lost
            return str(problem)
        epoch_s = found.epoch_s(EPOCH_IMAGES, row.config.train.batch_size)
        costs = {"gmacs": round(row.macs(stage) / 1e9, 2), "bytes": bytes_moved(row.config, stage), "epoch_s": round(epoch_s, 1)}
        records.append({"stage": stage, **found.record(), **costs})
    return ""
