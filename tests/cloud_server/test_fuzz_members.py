"""Whatever members of a running round say, in whatever order: the server lives, and an honest device loses nothing."""

import hashlib
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfed.blobs import BlobStore
from lwfed.transport.base import Connected, Will
from lwfed.wire import deltas, messages, tensors
from lwfed.wire.messages import Manifest, Offer, encode
from lwfed.wire.report import Traffic
from lwfed.wire.topics import Topics
from lwfed.wire.upload import contribution_id

from .devices import report
from .fleets import HELLO, start

TOPICS = Topics("default")
NAMES = ("honest", "x", "y")  # by participant
SETTINGS = (
    "model.depth=1", "stages.rounds_per_stage=1", "calibration.every=never", "evaluation.data=null",
    "rounds.min_devices=3", "rounds.quorum=0.3", "rounds.deadline_s=1000", "transfer.upload_slots=2",
)  # fmt: skip
MOST = 2**53 - 1


@dataclass
class Known:
    """What is known of the round before it is disturbed: the model, and updates by name, of which those of devices are sound."""

    before: dict
    updates: dict
    codec: str

    def after(self, name):
        """The weights that update `name` makes."""
        shapes = {key: tensor.shape for key, tensor in self.before.items()}
        if self.codec == "fp32":
            return tensors.decode(self.updates[name], shapes)
        found = deltas.decode(self.updates[name], shapes, self.codec)
        return {key: tensor + found[key] for key, tensor in self.before.items()}


def weights(course):
    """Of all that devices of the stage upload."""
    paths = [course.blobs.path(course.state.parts[part]) for part in course.plan.uploaded]
    shapes = [course.shapes[part] for part in course.plan.uploaded]
    return {name: tensor for path, shape in zip(paths, shapes, strict=True) for name, tensor in tensors.decode(path, shape).items()}


def begun(world, codec):
    fleet = world(*SETTINGS, f"transfer.codec={codec}")
    fleet.start()
    fleet.join("honest", takes=lambda stage, round: 7.0)
    return fleet


def learn(world, codec):
    """What devices would send in an undisturbed round, and what none should."""
    fleet = begun(world, codec)
    for name in NAMES[1:]:
        fleet.join(name)
    before = weights(fleet.course)
    fleet.finish()
    updates = {one.name: one.spool.read(one.upload._offer.manifest.blob.id) for one in fleet.devices}
    updates |= {"nan": filled(before, np.nan, codec), "far": filled(before, 1e9, codec)}
    return Known(before, {**updates, "junk": bytes(range(256)) * 16, "bomb": deltas.MAGIC + deltas.zstd.compress(bytes(1 << 24))}, codec)


def filled(before, value, codec):
    """An update whose numbers, or scales and halves, are all `value`."""
    if codec == "fp32":
        return tensors.encode({name: np.full_like(tensor, value) for name, tensor in before.items()})
    count = deltas.Layout({name: tensor.shape for name, tensor in before.items()}, codec).bytes
    return deltas.MAGIC + deltas.zstd.compress((np.float32(value).tobytes() * count)[:count])


class Member:
    """A device that says what it is told to, and does not listen. It has `updates`, by number."""

    def __init__(self, fleet, name, updates):
        self.name, self.updates = name, updates
        self.place = {"run": fleet.course.run_id, "stage": 1, "round": 1}
        self.store = BlobStore(fleet.root / name, durable=False)
        self.boot, self.offers = 1, {}
        self.transport = fleet.broker.transport()
        self.transport.open(name, Will(TOPICS.from_device(name, "state"), encode(messages.State(state="lost", start=start(1)))), self.hear)
        fleet.quiet()

    def hear(self, event):
        if isinstance(event, Connected):
            self.state("ready", 0)
            self.tell("hello", HELLO)

    def tell(self, kind, message):
        self.transport.publish(TOPICS.from_device(self.name, kind), encode(message), retain=kind == "state")

    def state(self, state, starts):
        self.boot += starts
        self.tell("state", messages.State(state=state, start=start(self.boot)))

    def greet(self, starts, images):
        self.boot = min(MOST, self.boot + starts)
        self.tell("hello", HELLO.model_copy(update={"start": start(self.boot), "images": images}))

    def offer(self, update, chunk_bytes=1024, lies=False, whose=None, images=1, place=()):
        manifest = self.store.manifest(self.store.put(self.updates[update]).id, chunk_bytes)
        if lies:
            manifest = Manifest(blob=manifest.blob, chunk_bytes=chunk_bytes, digests=manifest.digests[::-1])
        place = {**self.place, "participant": NAMES.index(self.name), **dict(place)}
        id = contribution_id(place["run"], place["stage"], place["round"], whose or self.name, manifest.blob.id)
        self.offers[update] = Offer(contribution=id, manifest=manifest, report=report(images=images, loss=1e6), **place)
        self.tell("offer", self.offers[update])

    def chunks(self, update, of=(0, 1), worker="w0", sound=True):
        """Of those that the last offer of the update has promised, from the first of `of` on in steps of the second."""
        if offer := self.offers.get(update):
            size = offer.manifest.chunk_bytes
            data = self.updates[update]
            pieces = {hashlib.sha256(piece).hexdigest(): piece for piece in (data[at : at + size] for at in range(0, len(data), size))}
            for index in range(of[0], len(offer.manifest.digests) + (not sound), of[1]):
                payload = pieces[offer.manifest.digests[index]] if sound else b"junk"
                self.transport.publish(TOPICS.update_chunk(self.name, worker, offer.contribution, index), payload)

    def fin(self, update):
        if offer := self.offers.get(update):
            self.tell("fin", messages.Fin(contribution=offer.contribution, traffic=Traffic(down=MOST, up=0)))

    def upload(self, update):
        self.offer(update)
        self.chunks(update)
        self.fin(update)

    def beat(self, round):
        self.tell("beat", messages.Beat(**{**self.place, "round": round}, epoch=9, epochs=1, step=9, steps=1, loss=-1e6, rss_mb=1e12))

    def fail(self, code, round):
        self.tell("fail", messages.Fail(**{**self.place, "round": round}, code=code, reason="\x00\x1b[2J\u2028" * 99))

    def need(self, id, missing):
        self.tell("need", messages.Need(blobs=(messages.Want(id=id, missing=missing),) * 3))

    def got(self, chunks):
        self.tell("got", messages.Got(chunks=chunks))

    def stray(self, rest):
        self.transport.publish(TOPICS.from_device(self.name, "fin") + rest, b"", retain=True)


UPDATE = st.sampled_from([0, 0, 0, 1])
SPOILT = {
    "chunk_bytes": st.sampled_from([1024, 1500]),
    "lies": st.booleans(),
    "whose": st.sampled_from([None, *NAMES]),
    "images": st.sampled_from([1, MOST]),
    "place": st.sampled_from([{}, {"round": 2}, {"stage": 2}, {"run": "other"}, {"participant": 0}]),
}


def act(name, *arguments, **named):
    return st.tuples(st.just(name), st.tuples(*arguments), st.fixed_dictionaries({}, optional=named))


TRANSFER = st.one_of(
    act("upload", UPDATE),
    act("offer", UPDATE),
    act("offer", UPDATE),
    act("offer", UPDATE, **SPOILT),
    act("chunks", UPDATE),
    act("chunks", UPDATE),
    act("chunks", UPDATE, of=st.sampled_from([(0, 2), (1, 2), (0, 3)]), worker=st.sampled_from(["w0", "w1"]), sound=st.booleans()),
    act("fin", UPDATE),
    act("fin", UPDATE),
)
TALK = st.one_of(
    act("state", st.sampled_from(["ready", "training", "lost", "stopped"]), st.integers(0, 1)),
    act("greet", st.sampled_from([0, 1, 1, 1, MOST]), st.sampled_from([0, 1, MOST])),
    act("beat", st.integers(1, 2)),
    act("fail", st.sampled_from(["data", "memory", "unfit", "diverged", "worker", "config"]), st.sampled_from([2, 2, 1])),
    act("need", st.sampled_from(["ab" * 32]), st.sampled_from([None, "0-999999", "5-3"])),
    act("got", st.sampled_from([1, 1_000_000])),
    act("stray", st.sampled_from(["", "/w0", "/w0/abc/0", "/w0/abc/x"])),
)
OF_THE_WORLD = st.tuples(st.sampled_from(["restart", "cut", "wait", "wait", "wait"]))
ACT = st.tuples(st.sampled_from([("x",), ("y",), ("x", "y"), ("y", "x")]), st.one_of(TRANSFER, TRANSFER, TRANSFER, TALK, OF_THE_WORLD))


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_whatever_members_say_the_honest_update_counts_and_no_bad_one_does(world, codec):
    known = learn(world, codec)

    @settings(max_examples=25, deadline=None)
    @given(updates=st.lists(st.sampled_from(sorted(known.updates)), min_size=2, max_size=2), acts=st.lists(ACT, min_size=10, max_size=40))
    def play(updates, acts):
        fleet = begun(world, codec)
        members = {name: Member(fleet, name, [known.updates[one] for one in updates]) for name in NAMES[1:]}
        assert fleet.course.state.owing == (0, 1, 2)
        for names, (what, *how) in acts:
            for name in names:
                if how:
                    getattr(members[name], what)(*how[0], **how[1])
                elif not fleet.course.state.over:
                    disturb(fleet, what, name)
        fleet.finish()
        judge(fleet, known)
        fleet.course.store.close()
        shutil.rmtree(fleet.root)

    play()


def disturb(fleet, what, name):
    match what:
        case "restart":
            fleet.kill()
            fleet.start()
        case "cut":
            fleet.broker.cut(name)
        case "wait":
            fleet.now += 4.0
    fleet.quiet()


def judge(fleet, known):
    (honest,) = fleet.devices
    assert honest.upload.state == "done"
    updates = {hashlib.sha256(known.updates[name]).hexdigest(): name for name in NAMES}
    counted = {one.participant: one for one in fleet.course.store.contributions()}
    assert updates[counted[0].blob] == "honest"
    images = sum(one.report.images for one in counted.values())
    afters = {number: known.after(updates[one.blob]) for number, one in counted.items()}
    found = weights(fleet.course)
    for name, tensor in known.before.items():
        expected = sum(afters[number][name].astype(float) * one.report.images for number, one in counted.items()) / images
        loss = 0.0 if known.codec == "fp32" else np.abs(expected - tensor).max() / deltas.LARGEST  # of what the server rounds
        assert np.abs(found[name] - expected).max() <= loss + 1e-2
