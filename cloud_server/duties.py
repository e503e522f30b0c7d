"""Doing what the coordinator's phase asks for, and handing the result back as its event.

Everything here may be done twice with the same result: after a crash the duty of the stored phase simply begins again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lwfed.child import Json
from lwfed.cloud_server.course import Course, Write
from lwfed.cloud_server.duty import Aggregate, Calibrate, Duty, Evaluate, Export, Prepare, duty
from lwfed.cloud_server.events import Evaluated, Event, Prepared
from lwfed.cloud_server.merge import Merged
from lwfed.cloud_server.news import News
from lwfed.cloud_server.store import Judgement, Scores, Step
from lwfed.cloud_server.telling import say_over
from lwfed.cloud_server.workshop import FromChild, Starter, Workshop
from lwfed.errors import Diverged

Apply = Callable[[Event, float, Write | None], None]


class Duties:
    def __init__(self, course: Course, news: News, start: Starter, deliver: Callable[[FromChild], None], apply: Apply) -> None:
        self.finished = False  # nothing is left to be done, ever
        self._course, self._news, self._apply = course, news, apply
        self._workshop = Workshop(start, deliver, news.warning, course.root / "work", course.config.worker.linger_s)
        self._duty: Duty | None = None  # done, or being done
        self._without_graphs = False  # said already

    @property
    def busy(self) -> bool:
        return self._workshop.busy

    def follow(self) -> None:
        """Begin the duty of the present phase unless it is begun."""
        wanted = duty(self._course.state)
        if wanted == self._duty:
            return
        self._duty = wanted
        match wanted:
            case Prepare(stage, attempt):
                self._news.doing(f"making the weights that stage {stage} begins with")
                copied = self._course.config.stages.layer_init == "copy" and attempt == 1  # a copy would be the same once more
                lacking = [engine for engine in self._course.config.graphs if engine not in self._course.graphs]
                parts = self._course.files(self._course.state.parts) if copied else {}
                self._submit("prepare", parts, stage=stage, attempt=attempt, graphs=lacking)
            case Evaluate(_, baselines):
                self._news.doing("measuring random weights and raw pixels" if baselines else "measuring the trained encoder")
                names = ["random", "raw_pixels"] if baselines else ["trained"]
                self._submit("evaluate", {} if baselines else self._course.files(self._course.state.parts), names=names)
            case Aggregate():
                self._submit("aggregate", **self._course.to_merge())
            case Calibrate(stage, round):
                place = {"stage": stage, "round": round, "lr_scale": self._course.lr_scale}
                self._submit("calibrate", self._course.files(self._course.state.parts), **place)
            case Export():
                self._export()

    def on(self, event: FromChild, now: float) -> None:
        """What the worker says. Raises the LwfedError with which a job failed for good."""
        try:
            result = self._workshop.on(event, now)
        except Diverged as error:
            if not isinstance(self._duty, Calibrate):
                raise
            self._leave_out(error, now)
            return
        if result is not None:
            self._take(result, now)

    def poll(self, now: float) -> None:
        self._workshop.poll(now)

    def next_wakeup(self) -> float | None:
        return self._workshop.next_wakeup()

    def end(self) -> None:
        """Idempotent."""
        self._workshop.end()

    def _submit(self, job: str, parts: dict[str, str], **more: Any) -> None:
        course = self._course
        places = {"config": course.blobs.path(course.config_ref.id), "out": self._workshop.folder, "kept": course.root / "images"}
        self._workshop.submit({"do": job, "parts": parts, **{name: str(path) for name, path in places.items()}, **more})

    def _take(self, result: Json, now: float) -> None:
        match self._duty, result["event"]:
            case Prepare(), "prepared":
                self._course.foresee(
                    {part: {name: tuple(shape) for name, shape in found.items()} for part, found in result["shapes"].items()}
                )
                self._say_without_graphs(result["no_graphs"])
                self._apply(Prepared(self._course.adopt(result["parts"]), self._course.adopt(result["graphs"])), now, None)
            case Aggregate(), "aggregated":
                stage, round, merged = self._course.state.stage, self._course.state.round, Merged.of(result)
                self._news.screened(stage, round, merged)
                self._apply(self._course.aggregated(merged), now, lambda step: step.leave_out(stage, round, merged.left_out))
            case Calibrate(stage, round), "calibrated":
                loss, seconds = result["loss"], result["seconds"]
                try:
                    calibrated = self._course.calibrated(result["parts"])
                except Diverged as error:
                    self._leave_out(error, now)
                    return
                self._news.calibration(stage, round, loss, seconds)
                self._apply(calibrated, now, lambda step: step.calibrated(stage, round, loss, seconds))
            case Evaluate(stage, baselines), "evaluated":
                judgement = Judgement(**result["variety"]) if result["variety"] else None
                scores = {name: Scores.of(**found) for name, found in result["scores"].items()}
                self._evaluated(0 if baselines else stage, scores, judgement, now)

    def _say_without_graphs(self, reason: str | None) -> None:
        if reason and not self._without_graphs:
            self._news.warning(f"devices run frozen layers by torch, which takes longer: {reason}")
            self._without_graphs = True

    def _leave_out(self, error: Diverged, now: float) -> None:
        """The aggregate is sound: the run must not end for want of a finer one."""
        self._news.warning(f"calibration is left out in this round: {error}")
        self._apply(self._course.calibrated({}), now, None)

    def _evaluated(self, stage: int, scores: Mapping[str, Scores], judgement: Judgement | None, now: float) -> None:
        attempt = self._course.state.attempt
        for name, one in scores.items():
            self._news.evaluation(stage, name, one)
        if judgement:
            self._news.judgement(stage, attempt, judgement)

        def write(step: Step) -> None:
            for name, one in scores.items():
                step.evaluated(stage, name, one)
            if judgement:
                step.judged(stage, attempt, judgement)

        self._apply(Evaluated(judgement.collapsed if judgement else None), now, write)

    def _export(self) -> None:
        say_over(self._news, self._course)
        self._workshop.end()
        self.finished = True
