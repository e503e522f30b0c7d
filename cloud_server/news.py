"""Everything that `cloud-server serve` says to people and, as JSON, to programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lwfed.cloud_server.fleet import Member
from lwfed.cloud_server.limits import Buckets
from lwfed.cloud_server.merge import Merged
from lwfed.cloud_server.rounds import MAX_ATTEMPTS, Reaction, Rules, State
from lwfed.cloud_server.store import Contribution, Judgement, Scores, StageFigures
from lwfed.config import RunConfig
from lwfed.console import Console, counted
from lwfed.plan import StagePlan
from lwfed.wire.messages import Beat

LABEL = 12  # characters
PROGRESS_EVERY_S = 30.0  # to people; programs get every beat of an honest device, one in ten seconds
BEATS_PER_S, BEATS_AT_ONCE = 0.5, 10
AGAIN_PER_S, AGAIN_AT_ONCE = 1 / 60, 20  # lines about the same thing, of those that a device can bring about at will
REMEDY = "a lower train.lr, a larger train.batch_size or another ssl.temperature may help"
NAMES = {"random": "random weights", "raw_pixels": "raw pixels", "trained": "trained encoder"}


class News:
    def __init__(self, console: Console, config: RunConfig, url: str, gated: bool = False) -> None:
        """`gated`: devices come in by the certificate that they got when they were enrolled."""
        self._console = console
        self._gated = gated
        self._config = config
        self._url = url
        self._next_progress = float("-inf")
        self._beats, self._lines = Buckets(BEATS_PER_S, BEATS_AT_ONCE), Buckets(AGAIN_PER_S, AGAIN_AT_ONCE)

    def broker(self, kind: str) -> None:
        here = "" if kind == "external" else ", for this machine only (others: --listen HOST, the name they reach this machine by)"
        where = ", for enrolled devices; enrol one with: cloud-server enrol NAME" if self._gated else here
        self._say("broker", "broker", f"{kind} at {self._url}{where}", url=self._url, kind=kind)

    def run(self, id: str, rules: Rules, status: str, place: str, root: Path) -> None:
        name, strategy = self._config.run.name, self._config.stages.strategy
        course = f"{name}: {strategy}, {counted(rules.stages, 'stage')}, {counted(sum(rules.rounds), 'round')}" + (
            " at most" if rules.patience else ""
        )
        text = {"started": course, "resumed": f"{course}; goes on at {place}"}.get(status, f"{course}; {status}")
        self._say("run", "run", f"{text} (state: {root})", run=name, id=id, strategy=strategy, stages=rules.stages, status=status)

    def unjudged(self) -> None:
        text = "whether a stage collapses cannot be judged without images on the server: set evaluation.data, or calibrate"
        self._say("judgement", "server", text)

    def doing(self, what: str) -> None:
        self._say("doing", "server", what)

    def database(self, lost: str | None) -> None:
        """Why its connection was lost; None when there is one again."""
        if lost is None:
            self.doing("the database answers again")
        else:
            self.warning(f"{lost}; until it answers nothing is acknowledged, and nothing is lost")

    def waiting(self, here: int, needed: int, now: float) -> None:
        if not self._lines.take(("waiting", here), now):
            return
        text = f"{here} of {counted(needed, 'device')} {'is' if 1 in (here, needed) else 'are'} here; start one with: {self.join_command()}"
        self._say("waiting", "waiting", text, devices=here, needed=needed, command=self.join_command())

    def waiting_for(self, participants: Iterable[int], seconds: float, now: float) -> None:
        named = _devices(participants)
        if self._lines.take(("waiting for", named), now):
            self._say("waiting", "waiting", f"for {named} to come back, at most {seconds:g} s")

    def stuck(self, state: State, now: float) -> None:
        """Nobody is left who could still contribute to the round."""
        if not self._lines.take(("stuck", state.stage, state.round), now):
            return
        who = "no further device" if state.contributed else "no device"
        how = {"failed": "failed", "refused": "was refused"}
        lost = [f"device {one} {how.get(state.failed.get(one, ''), 'has left')}" for one in state.chosen if one not in state.contributed]
        lost += [f"device {one} is not fit for it" for one in state.unfit]
        waits = any(there != "gone" and one in state.failed for one, there in state.devices.items())  # to be asked at the deadline
        mend = f"the next try is in {_duration(state.deadline - now)}, or when one is mended and started again"
        self.warning(f"{who} can train in this round: {_listed(lost)}; {mend if waits else 'mend one and start it again'}")

    def paused(self, state: State, to_go_on: str) -> None:
        if state.paused:
            when = "after the present round" if state.phase == "training" else "until then no round begins"
            self._say("paused", "paused", f"{when}; go on with: {to_go_on}", paused=True, phase=state.phase)
        else:
            self._say("paused", "resumed", "the run goes on", paused=False, phase=state.phase)

    def join_command(self) -> str:
        fleet = self._config.run.fleet
        if self._gated:
            return "edge-agent join --data FOLDER"
        return f"edge-agent join {self._url} --data FOLDER" + ("" if fleet == "default" else f" --fleet {fleet}")

    def device(self, member: Member, status: str, now: float, detail: str = "") -> bool:
        """Whether it was said: a device may come and go at will."""
        if not self._lines.take(member.participant, now):
            return False
        label = f"device {member.participant}"
        self._say("device", label, f"{status}{detail}", device=member.id, participant=member.participant, status=status)
        return True

    def joined(self, member: Member, status: str, now: float) -> bool:
        hello = member.hello
        images = f"{hello.images} images" if hello.images else "images"
        if hello.source != "folder":  # the name of a set that is split
            images += f" of {hello.source}" + (" before the split" if hello.images else "")
        about = f"{hello.machine}, {counted(hello.cores, 'core')}, {hello.memory_mb:.0f} MB, {images}"
        return self.device(member, status, now, f": {member.id} ({about})")

    def round_started(self, rules: Rules, stage: int, round: int, chosen: tuple[int, ...]) -> None:
        place = {"stage": stage, "round": round, "rounds": rules.last_round(stage, round)}
        text = f"round {round} of {place['rounds']}: {_devices(chosen)} train{'s' if len(chosen) == 1 else ''}"
        self._say("round", f"stage {stage}", text, **place, status="started", devices=len(chosen), loss=None)

    def round_closed(self, rules: Rules, stage: int, round: int, devices: int, loss: float | None) -> None:
        place = {"stage": stage, "round": round, "rounds": rules.last_round(stage, round)}
        shown = "" if loss is None else f", loss {loss:.4f}"
        text = f"round {round} of {place['rounds']}: done with {counted(devices, 'update')}{shown}"
        self._say("round", f"stage {stage}", text, **place, status="closed", devices=devices, loss=loss)

    def overdue(self, rules: Rules, participant: int, pace_s: float) -> None:
        text = (
            f"device {participant} is over its deadline, {rules.straggler_factor:g} times the {pace_s:.0f} s that it last took: "
            "it is no longer waited for, and its update counts while the round is open"
        )
        self.warning(text, participant=participant, pace_s=pace_s)

    def reduced(self, stage: int, round: int, lr_scale: float) -> None:
        text = f"round {round}: the loss no longer falls; from now on the learning rate is {lr_scale:.3g} of its own"
        self._say("reduced", f"stage {stage}", text, stage=stage, round=round, lr_scale=lr_scale)

    def stalled(self, rules: Rules, stage: int, round: int) -> None:
        text = f"round {round} of {rules.last_round(stage, round)}: the loss no longer falls; the stage ends with it"
        self._say("stalled", f"stage {stage}", text, stage=stage, round=round)

    def contribution(self, one: Contribution) -> None:
        report, memory = one.report, one.report.memory
        text = (
            f"update: loss {report.losses[-1]:.4f} over {counted(report.images, 'image')} in {report.seconds:.1f} s, "
            f"peak memory {memory.peak_mb:.0f} MB ({memory.baseline_mb:.0f} before training)"
        )
        fields = {"stage": one.stage, "round": one.round, "participant": one.participant, "loss": report.losses[-1]}
        measured = {"peak_mb": memory.peak_mb, "baseline_mb": memory.baseline_mb, "images": report.images}
        self._say("contribution", f"device {one.participant}", text, **fields, **measured)

    def screened(self, stage: int, round: int, found: Merged) -> None:
        """Whose updates were clipped, left out or lost, or why Krum was not used; nothing where nothing of this happened."""
        if found.lost:
            self.warning(
                f"round {round}: updates of {_devices(found.lost)} are damaged on this disk: it goes on without them; check the disk"
            )
        if found.fallback:
            byzantine = self._config.aggregation.byzantine or 0
            needs = f"{self._config.aggregation.rule} with aggregation.byzantine {byzantine} needs {2 * byzantine + 3} updates"
            instead = {"median": "the median is taken instead", "received": "the model stays as it was"}[found.fallback]
            self.warning(f"round {round}: {needs} and has {len(found.counted) + len(found.left_out)}: {instead}")
        done = [f"clipped {_devices(found.clipped)}, down to {min(found.clipped.values()):.2g} of what it changed"] if found.clipped else []
        done += [f"left out {_devices(found.left_out)}"] if found.left_out else []
        if done:
            fields = {"clipped": found.clipped, "left_out": found.left_out, "fallback": found.fallback}
            self._say("screened", f"stage {stage}", f"round {round}: {'; '.join(done)}", stage=stage, round=round, **fields)

    def progress(self, participant: int, beat: Beat, now: float) -> None:
        if not self._beats.take(participant, now):
            return
        if not self._console.as_json:
            if now < self._next_progress:
                return
            self._next_progress = now + PROGRESS_EVERY_S
        share = beat.step / beat.steps
        text = f"epoch {beat.epoch} of {beat.epochs}, {share:.0%} done, loss {beat.loss:.4f}, memory {beat.rss_mb:.0f} MB"
        self._say("progress", f"device {participant}", text, participant=participant, **beat.model_dump(exclude={"v", "run"}))

    def calibration(self, stage: int, round: int, loss: float, seconds: float) -> None:
        text = f"round {round}: calibrated in {seconds:.1f} s, loss {loss:.4f}"
        self._say("calibration", f"stage {stage}", text, stage=stage, round=round, loss=loss, seconds=seconds)

    def evaluation(self, stage: int, name: str, scores: Scores) -> None:
        text = f"{NAMES[name]}: {_scores(scores)}"
        self._say("evaluation", f"stage {stage}" if stage else "before", text, stage=stage, name=name, **vars(scores))

    def judgement(self, stage: int, attempt: int, found: Judgement) -> None:
        self._say("judgement", f"stage {stage}", f"features: {judgement(found)}", stage=stage, attempt=attempt, **vars(found))

    def collapsed(self, stage: int, attempt: int, reaction: Reaction) -> None:
        follows = {
            "warn": "the next layers are trained on them all the same (stages.on_collapse: warn)",
            "repeat": f"it is trained again from other weights, attempt {attempt + 1} of {MAX_ATTEMPTS}",
            "stop": "nothing is built upon them",
        }
        text = f"stage {stage} collapsed, its features are all alike: {follows[reaction]}; {REMEDY}"
        self._say("collapse", "warning", text, stage=stage, attempt=attempt, reaction=reaction)

    def stage_started(self, rules: Rules, plan: StagePlan, attempt: int, down: int, up: int) -> None:
        """`down` and `up`: bytes of a device in a round, at most."""
        begins = "begins" if attempt == 1 else f"begins anew, attempt {attempt}"
        text = f"{begins}; devices train {', '.join(plan.trained)}; a round takes at most {_bytes(down)} down and {_bytes(up)} up"
        fields = {"stage": plan.stage, "stages": rules.stages, "status": "started", "attempt": attempt}
        self._say("stage", f"stage {plan.stage}/{rules.stages}", text, **fields, round_bytes_down=down, round_bytes_up=up)

    def stage_ended(self, rules: Rules, stage: int, seconds: float, scores: Scores | None, figures: StageFigures | None) -> None:
        fields: dict[str, Any] = {"knn": scores.knn if scores else None, "probe": scores.probe if scores else None, "seconds": seconds}
        text = f"done in {_duration(seconds)}"
        if figures:
            text += (
                f"; worker peak {figures.worker_peak_mb:.0f} MB ({figures.worker_baseline_mb:.0f} before training); "
                f"per device {_bytes(figures.bytes_down)} down, {_bytes(figures.bytes_up)} up"
            )
            fields |= vars(figures)
        self._say("stage", f"stage {stage}/{rules.stages}", text, stage=stage, stages=rules.stages, status="ended", **fields)

    def finished(self, encoder: Path, seconds: float) -> None:
        text = f"after {_duration(seconds)}: encoder in {encoder}"
        self._say("finished", "finished", text, encoder=str(encoder), seconds=seconds)

    def stopped(self, reason: str, stage: int, encoder: Path | None, seconds: float) -> None:
        """`encoder` is that of `stage`, the last one before the one that collapsed."""
        left = f"encoder of stage {stage} in {encoder}" if encoder else "there is no encoder"
        fields = {"reason": reason, "stage": stage, "encoder": str(encoder) if encoder else None, "seconds": seconds}
        self._say("stopped", "stopped", f"after {_duration(seconds)}: {reason}; {left}", **fields)

    def complaints(self, stage: int, round: int, found: Mapping[str, Mapping[str, int]]) -> None:
        """`found`: device -> code -> how often since this was last said."""
        text = f"round {round}: complaints about {_listed([f'{device} ({codes_of(codes)})' for device, codes in found.items()])}"
        self._say("complaints", f"stage {stage}", text, stage=stage, round=round, devices=found)

    def warning(self, text: str, **fields: Any) -> None:
        self._say("warning", "warning", text, **fields)

    def _say(self, event: str, label: str, text: str, **fields: Any) -> None:
        self._console.say(event, f"{label:<{LABEL}}{text}", **fields)


def _devices(participants: Iterable[int]) -> str:
    numbers = sorted(participants)
    return f"{'device' if len(numbers) == 1 else 'devices'} {_listed(numbers)}"


def _listed(things: Sequence[object]) -> str:
    return ", ".join(map(str, things[:10])) + (f" and {len(things) - 10} more" if len(things) > 10 else "")


def codes_of(complaints: Mapping[str, int]) -> str:
    """Such as ``flood 900, stale 2``."""
    return ", ".join(f"{code} {number}" for code, number in sorted(complaints.items()))


def judgement(found: Judgement) -> str:
    return f"spread {found.spread:.3f}, effective rank {found.rank:.1f}" + (", collapsed" if found.collapsed else "")


def _scores(scores: Scores) -> str:
    return f"kNN {scores.knn:.1%}" + ("" if scores.probe is None else f", linear probe {scores.probe:.1%}")


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes / 60:.1f} h"
