"""What must hold whatever happens, checked while a schedule runs and at its end.

1. What is acknowledged is recorded: when `done` is sent, and at every later look, the contribution is in the store; and
   until its round is aggregated its update is on disk with its digest.
2. Nothing is counted twice: a participant contributes once to a round, and what the coordinator counts is what the store holds.
3. The run never goes back, over all starts of the server.
4. No device is taken for two.
5. A failure counts once, however often its message arrives.
6. The model is the one that the recorded contributions make, bit for bit, computed anew from nothing (`Reference`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lwfed.cloud_server.aggregate import combine, screen
from lwfed.cloud_server.course import Course
from lwfed.cloud_server.rounds import State
from lwfed.cloud_server.store import Contribution
from lwfed.cloud_server.updates import Array, Index, Share, Updates
from lwfed.config import RunConfig
from lwfed.plan import StagePlan
from lwfed.seeds import derive
from lwfed.tools.faults import canned
from lwfed.wire import deltas, tensors
from lwfed.wire.messages import Done, Fail, decode
from lwfed.wire.topics import FromDevice, ToDevice, Topics

PHASES = ("preparing", "waiting", "training", "aggregating", "calibrating", "evaluating", "finished")


class Judge:
    def __init__(self, topics: Topics) -> None:
        self.violations: list[str] = []
        self.rounds = 0  # that were completed
        self._topics = topics
        self.forget()

    def forget(self) -> None:
        """The run is over before its end; another begins, to which nothing of it may count."""
        self._acknowledged: set[str] = set()
        self._state = State()
        self._failures: dict[tuple[str, int, int], set[int]] = {}  # device, stage, round -> attempts of which it said that they failed
        self._counted: Counter[tuple[int, int, int]] = Counter()  # stage, round, participant -> failures that counted

    def blame(self, text: str) -> None:
        if text not in self.violations:
            self.violations.append(text)

    def published(self, course: Course, topic: str, payload: bytes) -> None:
        """What the server is about to say."""
        if not topic.endswith("/done"):
            return
        match self._topics.parse(topic):
            case ToDevice(device, "done"):
                id = decode(Done, payload).contribution
                self._acknowledged.add(id)
                if id not in self._stored(course) and not course.store.has_contribution(id):
                    self.blame(f"done was sent to {device} for {id}, which is not in the store")

    def said(self, topic: str, payload: bytes) -> None:
        """What a device is about to say."""
        if not topic.endswith("/fail"):
            return
        match self._topics.parse(topic):
            case FromDevice(device, "fail"):
                fail = decode(Fail, payload)
                self._failures.setdefault((device, fail.stage, fail.round), set()).add(fail.attempt)

    def look(self, course: Course) -> None:
        """After every step of the server."""
        state, before = course.state, self._state
        if state is before:
            return
        self._state = state
        if _order(state) < _order(before):
            self.blame(f"the run went back from {_place(before)} to {_place(state)}")
        if failures := _failures(state) - _failures(before):
            self._look_at_failures(course, [participant for _, participant in failures])
        if not state.contributed or state.contributed == before.contributed:
            return
        if _order(state) == _order(before) and not before.contributed.items() <= state.contributed.items():
            self.blame(f"{_place(state)}: an update that was counted is not any more")
        if not set(state.contributed) <= set(state.chosen):
            self.blame(f"{_place(state)}: an update of a device is counted that was not chosen")
        if (stored := self._stored(course)) != set(state.contributed.values()):
            self.blame(f"{_place(state)}: {len(state.contributed)} updates are counted and {len(stored)} stored")

    def _look_at_failures(self, course: Course, participants: list[int]) -> None:
        """`participants`: of whom one more counts, each as often as it does."""
        state = course.state
        self._counted.update((state.stage, state.round, participant) for participant in participants)
        for device in course.store.devices():
            said = len(self._failures.get((device.id, state.stage, state.round), ()))
            counted = self._counted[state.stage, state.round, device.participant]
            if counted > said:
                self.blame(f"{_place(state)}: of participant {device.participant} {counted} failures count, not {said}")

    def begun(self, course: Course) -> None:
        """After every start of the server: nothing that was seen before is forgotten."""
        lost = self._acknowledged - {one.id for one in course.store.contributions()}
        for id in sorted(lost):
            self.blame(f"contribution {id} was acknowledged and is no longer in the store")
        self._stored(course)

    def _stored(self, course: Course) -> set[str]:
        """The contributions to the present round. Until they are aggregated their updates must be on disk."""
        state = course.state
        stored = course.store.contributions(state.stage, state.round)
        for one in stored if state.phase in ("training", "aggregating") else ():
            path = course.root / "updates" / one.blob
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != one.blob:
                self.blame(f"{_place(state)}: the update {one.id} of participant {one.participant} is recorded and not on disk")
        return {one.id for one in stored}

    def end(self, course: Course, folder: Path) -> None:
        """The run is over."""
        self.begun(course)
        recorded = course.store.contributions()
        self.rounds = sum(row.closed_s is not None for row in course.store.rounds())
        for (stage, round, participant), count in Counter((one.stage, one.round, one.participant) for one in recorded).items():
            if count > 1:
                self.blame(f"participant {participant} counts {count} times in stage {stage}, round {round}")
        for device in course.store.devices():
            if device.doubled_s is not None:
                self.blame(f"participant {device.participant} was taken for two agents")
        found = {part: blob for (_, _), parts in course.store.checkpoints().items() for part, blob in parts.items()}
        if found | course.state.parts != found:
            self.blame("the model of the run is not that of its last checkpoints")
        folder.mkdir(exist_ok=True)
        for text in differences(course, recorded, folder):
            self.blame(text)


def differences(course: Course, recorded: list[Contribution], folder: Path) -> Iterator[str]:
    """Where updates and models of the run are not those of the reference."""
    checkpoints = course.store.checkpoints()
    for stage, round, updates, model in Reference(course.config, recorded, folder).rounds():
        place = f"stage {stage}, round {round}"
        blobs = {one.participant: one.blob for one in recorded if (one.stage, one.round) == (stage, round)}
        if blobs != updates:
            yield f"{place}: the updates are not those that its devices make of the model of that round"
        if (stage, round) in checkpoints and checkpoints[stage, round] != model:
            wrong = sorted(part for part in model if checkpoints[stage, round].get(part) != model[part])
            yield f"{place}: the model is not what the contributions make ({', '.join(wrong)})"


Place = tuple[int, int, int]  # stage, round, participant
Update = tuple[int, int, dict[int, str], dict[str, str]]  # stage, round, participant -> blob, part -> blob


class Reference:
    """A run that nothing disturbed, and to which the same devices contributed."""

    def __init__(self, config: RunConfig, recorded: list[Contribution], folder: Path) -> None:
        self._config, self._folder = config, folder
        self._recorded = sorted((one.stage, one.round, one.participant) for one in recorded)
        self._model: canned.Model = {}
        self._digests: dict[str, str] = {}  # of its parts
        self._lost: dict[str, canned.Tensors] = {}  # of a participant, or of a part, by the last encoding in the stage

    def rounds(self) -> Iterator[Update]:
        for stage, rounds in enumerate(self._config.round_counts, 1):
            plan = self._config.plan(stage)
            kept = {part: held for part, held in self._model.items() if part in plan.present}
            self._model, self._lost = kept | {part: canned.initial(part, 1, self._config.run.seed) for part in plan.added}, {}
            self._digests = {part: _digest(held) for part, held in self._model.items()}
            for round in range(1, rounds + 1):
                updates, weights = self._updates(plan, stage, round)
                after = self._model | self._aggregated(plan, weights)
                every = self._config.calibration.every
                if every == "round" or (every == "stage" and round == rounds):
                    after |= canned.calibrated(after, plan.calibrated, stage, round)
                self._publish(after, derive(self._config.run.seed, "publish", stage, round))
                yield stage, round, updates, dict(self._digests)

    def _updates(self, plan: StagePlan, stage: int, round: int) -> tuple[dict[int, str], dict[int, canned.Tensors]]:
        """By participant: the digests of what counts, as it travels, and the weights that it stands for."""
        received = {name: tensor for part in plan.uploaded for name, tensor in self._model[part].items()}
        updates, found = {}, {}
        for place in [place for place in self._recorded if place[:2] == (stage, round)]:
            participant = place[2]
            data, found[participant] = self._travelled(received, canned.trained(self._model, plan.uploaded, *place), participant, place)
            updates[participant] = hashlib.sha256(data).hexdigest()
        return updates, found

    def _travelled(self, received: canned.Tensors, update: canned.Tensors, participant: int, place: Place) -> tuple[bytes, canned.Tensors]:
        transfer, (stage, round, _) = self._config.transfer, place
        if transfer.codec == "fp32":
            return tensors.encode(update), update
        seed = derive(self._config.run.seed, "update", participant, stage, round)
        return self._encoded(f"update {participant}", received, update, transfer.top_k, seed)

    def _publish(self, after: canned.Model, seed: int) -> None:
        """The model becomes what devices can make of what they are sent."""
        for part in sorted(after):
            before, held = self._model[part], after[part]
            if held is before or (digest := _digest(held)) == self._digests[part]:
                continue
            if self._config.transfer.codec != "fp32":
                _, held = self._encoded(part, before, held, 1.0, derive(seed, "patch", part))
                digest = _digest(held)
            self._model[part], self._digests[part] = held, digest

    def _encoded(self, what: str, before: canned.Tensors, after: canned.Tensors, top_k: float, seed: int) -> tuple[bytes, canned.Tensors]:
        """The differences, and what they make of `before`; what they lose is added to the next ones."""
        codec, lost = self._config.transfer.codec, self._lost.get(what, {})
        assert codec != "fp32"
        wanted = {name: after[name] - before[name] + lost.get(name, np.float32(0)) for name in after}
        encoded = deltas.encode(wanted, codec, top_k, seed)
        self._lost[what] = encoded.residual
        sent = deltas.decode(encoded.data, {name: tensor.shape for name, tensor in after.items()}, codec)  # as devices do
        return encoded.data, {name: before[name] + sent[name] for name in after}

    def _aggregated(self, plan: StagePlan, weights: dict[int, canned.Tensors]) -> canned.Model:
        """`weights`: of each participant."""
        if not weights:
            return {}

        def read(update: Path, name: str, before: Array, index: Index) -> Array:
            return weights[int(update.name)][name][index]

        previous = {part: self._file(part, self._model[part]) for part in plan.uploaded}
        shares = [Share(participant, canned.images(participant), Path(str(participant))) for participant in weights]
        settings, updates = self._config.aggregation, Updates(previous, shares, read)
        return dict(combine(settings, screen(settings, updates), updates))

    def _file(self, name: str, held: canned.Tensors) -> Path:
        path = self._folder / name
        path.write_bytes(tensors.encode(held))
        return path


def _digest(held: canned.Tensors) -> str:
    return hashlib.sha256(tensors.encode(held)).hexdigest()


def _failures(state: State) -> set[tuple[str, int]]:
    """How devices have failed, each with the participant."""
    failed = {("failed", participant) for participant, how in state.failed.items() if how == "failed"}
    return failed | {("short", participant) for participant in state.retried} | {("unfit", participant) for participant in state.unfit}


def _order(state: State) -> tuple[int, int, int]:
    return state.stage, state.round, PHASES.index(state.phase)


def _place(state: State) -> str:
    return f"stage {state.stage}, round {state.round}, {state.phase}"
