"""What may be written together with a new state of the run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sqlalchemy import Executable

from lwfed.cloud_server.store import schema
from lwfed.cloud_server.store.records import Contribution, Judgement, Scores


class Step:
    """Gathers statements, so that they can be executed again on another connection."""

    def __init__(self, insert: Any, run: str, now: float) -> None:
        self.statements: list[Executable] = []
        self._insert = insert  # of the database's dialect: they differ in name only
        self._run = run
        self._now = now

    def begin_round(self, stage: int, round: int, chosen: tuple[int, ...]) -> None:
        """Also for devices chosen later: the round keeps its beginning."""
        row = {"run": self._run, "stage": stage, "round": round, "chosen": list(chosen), "begun_s": self._now}
        statement = self._insert(schema.rounds).values(**row)
        self.statements.append(statement.on_conflict_do_update(index_elements=["run", "stage", "round"], set_={"chosen": row["chosen"]}))

    def contribute(self, contribution: Contribution) -> None:
        row = {
            "id": contribution.id,
            "run": self._run,
            "stage": contribution.stage,
            "round": contribution.round,
            "participant": contribution.participant,
            "blob": contribution.blob,
            "bytes": contribution.size,
            "images": contribution.report.images,
            "loss": contribution.report.losses[-1],
            "peak_mb": contribution.report.memory.peak_mb,
            "baseline_mb": contribution.report.memory.baseline_mb,
            "report": contribution.report.model_dump(mode="json"),
            "down_bytes": contribution.traffic.down,
            "up_bytes": contribution.traffic.up,
            "seconds": contribution.report.seconds,
            "received_s": self._now,
        }
        self.statements.append(schema.contributions.insert().values(row))

    def close_round(self, stage: int, round: int) -> None:
        self._update_round(stage, round, closed_s=self._now)

    def leave_out(self, stage: int, round: int, participants: tuple[int, ...]) -> None:
        """Updates that the rule of aggregation did not choose."""
        self._update_round(stage, round, left_out=list(participants))

    def calibrated(self, stage: int, round: int, loss: float, seconds: float) -> None:
        self._update_round(stage, round, calibration_loss=loss, calibration_seconds=seconds)

    def evaluated(self, stage: int, name: str, scores: Scores) -> None:
        values = asdict(scores)
        statement = self._insert(schema.evaluations).values(run=self._run, stage=stage, name=name, **values)
        self.statements.append(statement.on_conflict_do_update(index_elements=["run", "stage", "name"], set_=values))

    def judged(self, stage: int, attempt: int, judgement: Judgement) -> None:
        self.statements.append(schema.judgements.insert().values(run=self._run, stage=stage, attempt=attempt, **asdict(judgement)))

    def checkpoint(self, stage: int, round: int, parts: dict[str, str]) -> None:
        """Replaces the one of the stage's previous round."""
        self.forget_checkpoint(stage)
        self.statements.append(schema.checkpoints.insert().values(run=self._run, stage=stage, round=round, parts=parts))

    def forget_checkpoint(self, stage: int) -> None:
        table = schema.checkpoints
        self.statements.append(table.delete().where(table.c.run == self._run, table.c.stage == stage))

    def _update_round(self, stage: int, round: int, **values: Any) -> None:
        table = schema.rounds
        place = table.c.run == self._run, table.c.stage == stage, table.c.round == round
        self.statements.append(table.update().where(*place).values(**values))
