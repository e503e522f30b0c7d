"""What `edge-agent profile` measures, and what follows from it. Measuring apart, pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from lwfed.config import RunConfig
from lwfed.errors import ConfigError
from lwfed.plan import Strategy

Record = Mapping[str, Any]
MARGIN = 1.1  # of the measured peak: longer runs leave more behind
NO_FIT = "it does not fit: "

# arXiv 2401.11647 v4, Table 2: MoCo v3, ViT-Tiny, batch 512, on a GPU, over the whole run.
PAPER: Mapping[Strategy, Mapping[str, float]] = {
    "end_to_end": {"memory_gb": 8.72, "gflops": 586, "communication_gb": 8.40},
    "layer_wise": {"memory_gb": 2.61, "gflops": 139, "communication_gb": 1.66},
    "progressive": {"memory_gb": 8.69, "gflops": 318, "communication_gb": 5.04},
}

# How many times less than end to end, as printed there: from figures before they were rounded.
PAPER_LESS: Mapping[Strategy, Mapping[str, float]] = {
    "layer_wise": {"memory_gb": 3.34, "gflops": 4.20, "communication_gb": 5.07},
    "progressive": {"memory_gb": 1.00, "gflops": 1.84, "communication_gb": 1.67},
}


@dataclass(frozen=True)
class Case:
    config: RunConfig
    stage: int
    limit_mb: int | None  # None: as much as there is

    @property
    def strategy(self) -> Strategy:
        return self.config.stages.strategy

    @property
    def text(self) -> str:
        limit = "" if self.limit_mb is None else f", {self.limit_mb} MB"
        return f"{self.strategy}, stage {self.stage}, threads: {self.config.train.threads}{limit}"

    def record(self) -> dict[str, Any]:
        threads = self.config.train.threads
        return {"strategy": self.strategy, "stage": self.stage, "threads": threads, "limit_mb": self.limit_mb}


def make_cases(
    config: RunConfig,
    strategies: Sequence[Strategy] | None,
    stages: Sequence[int] | None,
    threads: Sequence[int] | None,
    limits: Sequence[int] | None,
) -> list[Case]:
    """Raises ConfigError for a stage that does not exist. A strategy of a single stage beside others is measured in that one."""
    made = []
    wanted = strategies or (config.stages.strategy,)
    for strategy, count, limit in product(wanted, threads or (config.train.threads,), limits or (None,)):
        of_strategy = config.model_copy(
            update={
                "stages": config.stages.model_copy(update={"strategy": strategy}),
                "train": config.train.model_copy(update={"threads": count}),
            }
        )
        last = of_strategy.stage_count
        chosen = stages if stages and (last > 1 or len(wanted) == 1) else sorted({1, (last + 1) // 2, last})
        for stage in chosen:
            if not 1 <= stage <= last:
                raise ConfigError(f"--stages {stage}: {strategy} has stages 1 to {last} here; choose among them")
            made.append(Case(of_strategy, stage, limit))
    return made


def judge(record: Record, budget_mb: float) -> dict[str, Any]:
    """`record` with whether the case fits: into its limit, or into the budget where it has none."""
    return {**record, "fits": "memory" in record and record["memory"]["peak_mb"] <= (record["limit_mb"] or budget_mb)}


def tried(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if not record.get("skipped")]


def measured(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if "memory" in record]


def recommend(records: Sequence[Record], budget_mb: float, config: RunConfig) -> dict[str, Any]:
    """The first strategy whose measured stages all fit, with the fastest number of threads; and sentences for people.

    `memory_mb` is what the agent should be allowed, for which it plans as it has been measured. Cases under each limit are judged apart.
    """
    texts, best = [], None
    for strategy, limit in dict.fromkeys((record["strategy"], record["limit_mb"]) for record in records):
        own = [record for record in records if (record["strategy"], record["limit_mb"]) == (strategy, limit)]
        room = f"{limit or budget_mb:.0f} MB"
        misfits = {record["threads"] for record in own if not record["fits"]}
        if fitting := [record for record in own if record["threads"] not in misfits]:
            but = f"; not with threads: {', '.join(map(str, sorted(misfits)))}" if misfits else ""
            texts.append(f"{strategy} fits into {room}: the measured stages take up to {largest(fitting):.0f} MB{but}.")
            best = best or fitting
        else:
            first = next(record for record in own if not record["fits"])
            why = (first.get("reason") or f"it takes {largest(measured(own)):.0f} MB").removeprefix(NO_FIT)
            verb = "was not tried in" if first.get("skipped") else "does not fit into"
            texts.append(f"{strategy} {verb} {room}: {why}.")
    if best is None:
        return {"strategy": None, "texts": [*texts, *(_advice(config) if tried(records) else ["Nothing was tried."])]}
    times = {count: _time([record for record in best if record["threads"] == count]) for count in {record["threads"] for record in best}}
    threads = min(times, key=lambda count: (times[count], count))
    own = [record for record in best if record["threads"] == threads]
    needs = max(record["planned"]["needs_mb"] for record in own)
    wished = math.ceil(max(MARGIN * largest(own), needs) / 10) * 10
    allow = min(wished, math.floor(best[0]["limit_mb"] or budget_mb))
    strategy = best[0]["strategy"]
    texts.append(f"Recommended: {strategy} with train.threads {threads}; allow the agent {allow} MB.")
    return {"strategy": strategy, "threads": threads, "memory_mb": allow, "texts": texts}


def largest(records: Iterable[Record]) -> float:
    """Peak of the case that takes most."""
    return max(float(record["memory"]["peak_mb"]) for record in records)


def _time(records: Sequence[Record]) -> float:
    return sum(float(record["step_s"]) for record in records)


def _advice(config: RunConfig) -> list[str]:
    train = config.train
    pieces = "set train.micro_batch, which is exact, for example to 32, or " if train.micro_batch is None else ""
    return [f"No strategy is known to fit. On the server, {pieces}lower train.batch_size ({train.batch_size}) or model.image_size."]
