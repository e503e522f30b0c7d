"""Parts and updates as differences: what the server makes of them is what every device makes of them."""

import contextlib
import errno
import hashlib
import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from lwfed.blobs import BlobStore
from lwfed.cloud_server import updates
from lwfed.cloud_server.aggregate import combine, screen
from lwfed.cloud_server.patches import publish
from lwfed.cloud_server.updates import Share, Updates
from lwfed.cloud_server.weights import MAX_DIFFERENCE, check, unpacked
from lwfed.config import load_config
from lwfed.edge_agent.differences import encode, patch
from lwfed.edge_agent.previous import Turn
from lwfed.errors import Diverged, InvalidPayload, StateError
from lwfed.models.shapes import part_shapes
from lwfed.wire import deltas, messages, tensors

from .devices import drawn
from .fleets import of, undisturbed
from .merging import RULES, settings_of
from .world import NumpyWorker

CODECS = ("int8", "bf16")
PART = "layer.1"
MAPS = Path("/proc/self/maps")


def config(codec="int8"):
    small = ["model.image_size=8", "model.width=8", "model.depth=2", "model.heads=2", "ssl.hidden_dim=8", "ssl.output_dim=4"]
    return load_config("demo", [*small, f"transfer.codec={codec}"])


def weights(label, scale=1.0):
    return {name: drawn(shape, label, name) * np.float32(scale) for name, shape in part_shapes(config(), PART).items()}


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs", durable=False)


def put(blobs, found):
    return blobs.put(tensors.encode(found)).id


def moved(start, label):
    return {name: start[name] + step for name, step in weights(label, 0.01).items()}


def read(blobs, id):
    return tensors.decode(blobs.path(id), part_shapes(config(), PART))


@pytest.mark.parametrize("codec", CODECS)
def test_devices_make_of_a_patch_what_is_announced(blobs, codec):
    one = config(codec)
    old, after = put(blobs, weights("old")), put(blobs, moved(weights("old"), "step"))
    found = publish(one.transfer, blobs, {PART: old, "norm": old}, {PART: after, "norm": old}, {}, seed=3)
    assert set(found.parts) == set(found.patches) == set(found.residuals) == {PART}
    base, data = found.patches[PART]
    made = patch(one, PART, part_shapes(one, PART), blobs.path(base), [blobs.path(data)], found.parts[PART])
    assert base == old
    assert hashlib.sha256(made).hexdigest() == found.parts[PART] != after
    assert publish(one.transfer, blobs, {PART: old}, {PART: after}, {}, seed=3) == found, "after a crash"
    assert publish(one.transfer, blobs, {PART: old}, {PART: after}, {}, seed=4).parts != found.parts or codec == "bf16"


def test_fp32_is_published_as_it_is(blobs):
    old, after = put(blobs, weights("old")), put(blobs, weights("new"))
    found = publish(config("fp32").transfer, blobs, {PART: old, "norm": old}, {PART: after, "norm": old}, {}, seed=3)
    assert (found.parts, found.patches, found.residuals) == ({PART: after}, {}, {})


@pytest.mark.parametrize("codec", CODECS)
def test_what_a_round_could_not_say_the_next_one_says(blobs, codec):
    """Ten rounds in the same direction: what devices have lags behind by what one encoding loses, not by the sum of ten."""
    one, residuals, told = config(codec), {}, put(blobs, weights("old"))
    wanted, lost = weights("old"), 0.0
    for round in range(10):
        step = weights("step", 0.01)
        wanted = {name: wanted[name] + step[name] for name in wanted}
        before = read(blobs, told)
        found = publish(
            one.transfer, blobs, {PART: told}, {PART: put(blobs, {name: before[name] + step[name] for name in before})}, residuals, round
        )
        told, residuals = found.parts[PART], found.residuals
        missing = read(blobs, residuals[PART])
        lost = max(lost, max(float(np.abs(missing[name]).max()) for name in missing))
    reached = read(blobs, told)
    for name in wanted:
        assert np.allclose(reached[name] + missing[name], wanted[name], atol=1e-5)
    assert 0 < lost < 0.002


def test_a_round_that_no_difference_can_tell_of_ends_with_advice(blobs):
    old, far = put(blobs, weights("old")), {name: np.full_like(tensor, np.finfo(np.float32).max) for name, tensor in weights("old").items()}
    with pytest.raises(Diverged, match=r"lower calibration\.lr"):
        publish(config().transfer, blobs, {PART: old}, {PART: put(blobs, far)}, {}, seed=1)


@pytest.fixture
def sent(tmp_path, blobs):
    """The file of what devices received, and those of six updates: as they were sent, and as the weights that they make."""

    def sent(codec):
        received = weights("old")
        held, folder = blobs.path(put(blobs, received)), tmp_path / codec
        (folder / "weights").mkdir(parents=True)
        for number in range(6):
            data = deltas.encode(weights(number, 0.01), codec, 1.0, number).data
            (folder / str(number)).write_bytes(data)
            change = deltas.decode(data, part_shapes(config(), PART), codec)
            (folder / "weights" / str(number)).write_bytes(tensors.encode({name: received[name] + change[name] for name in received}))
        return (
            held,
            {number: folder / str(number) for number in range(6)},
            {number: folder / "weights" / str(number) for number in range(6)},
        )

    return sent


def merged(settings, held, files, read=updates.weights):
    found = Updates({PART: held}, [Share(number, 1 + number, file) for number, file in files.items()], read)
    return tensors.encode(dict(combine(settings, screen(settings, found), found))[PART])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("rule", RULES)
def test_differences_are_aggregated_as_the_weights_that_they_make(tmp_path, monkeypatch, sent, codec, rule):
    """To the bit, clipped, and block by block; nothing as large as weights is written."""
    held, files, made = sent(codec)
    settings = settings_of(rule, clip_norm="median")
    expected = merged(settings, held, made)
    monkeypatch.setattr(updates, "BLOCK_NUMBERS", 50)
    with unpacked(config(codec).transfer, [held], files, tmp_path / "unpacked") as (readable, read):
        assert merged(settings, held, readable, read) == expected
        written = sum(path.stat().st_size for path in (tmp_path / "unpacked").iterdir())
        assert written <= (0.6 if codec == "bf16" else 0.4) * sum(path.stat().st_size for path in made.values())
    assert not (tmp_path / "unpacked").exists()


@pytest.mark.skipif(not MAPS.exists(), reason="this system does not say which files are mapped")
@pytest.mark.parametrize("codec", ["fp32", *CODECS])
def test_no_update_stays_mapped_when_it_was_read(tmp_path, sent, codec):
    """What is read of a mapped file counts as memory of the server, and would grow with the devices."""
    held, files, made = sent("int8" if codec == "fp32" else codec)
    with unpacked(config(codec).transfer, [held], made if codec == "fp32" else files, tmp_path / "unpacked") as (readable, read):
        mapped = []

        def watched(*block):
            found = read(*block)
            mapped.extend(file for file in readable.values() if str(file) in MAPS.read_text())
            return found

        merged(settings_of("krum"), held, readable, watched)
    assert mapped == []


def test_what_the_disk_has_spoilt_is_left_out(tmp_path, sent):
    held, files, _ = sent("int8")
    files[2].write_bytes(files[2].read_bytes()[:-1])
    with unpacked(config().transfer, [held], files, tmp_path / "unpacked") as (readable, _):
        assert sorted(readable) == [0, 1, 3, 4, 5]


def test_a_full_disk_is_told_with_what_is_needed(tmp_path, monkeypatch, sent):
    held, files, _ = sent("int8")

    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with (
        pytest.raises(StateError, match=r"unpacked: No space left on device; free about \d+ MiB"),
        unpacked(config().transfer, [held], files, tmp_path / "unpacked"),
    ):
        pass
    assert not (tmp_path / "unpacked").exists()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("factor", [1.02, 3e20])
def test_a_difference_that_could_lead_beyond_float32_is_refused(tmp_path, blobs, codec, factor):
    one = {name: np.full_like(tensor, MAX_DIFFERENCE * factor) for name, tensor in weights("old").items()}
    (tmp_path / "update").write_bytes(deltas.encode(one, codec, 1.0, 1).data)
    with pytest.raises(InvalidPayload, match=r"differences above 1e\+18"):
        check(config(codec).transfer, [blobs.path(put(blobs, weights("old")))], tmp_path / "update")


@pytest.mark.parametrize("codec", CODECS)
def test_no_updates_that_are_taken_make_a_round_that_cannot_be_published(tmp_path, blobs, codec):
    """One device's differences are all that counts, and of every sign and size that is taken: what residuals add must not overflow."""
    one, told, residuals = config(codec), put(blobs, weights("old")), {}
    for round in range(22):
        signs = {name: np.sign(drawn(tensor.shape, name, round)) for name, tensor in weights("old").items()}
        sizes = {name: np.abs(drawn(tensor.shape, "size", name, round)).clip(0, 1) for name, tensor in weights("old").items()}
        update, before = tmp_path / "update", read(blobs, told)
        harm = {name: signs[name] * sizes[name] for name in signs}
        far = np.float32(min(9.8 * (norm(before) + 1) / norm(harm), 0.98 * MAX_DIFFERENCE))
        update.write_bytes(deltas.encode({name: tensor * far for name, tensor in harm.items()}, codec, 1.0, round).data)
        check(one.transfer, [blobs.path(told)], update)
        change = deltas.decode(update.read_bytes(), part_shapes(config(), PART), codec)
        found = publish(
            one.transfer, blobs, {PART: told}, {PART: put(blobs, {name: before[name] + change[name] for name in before})}, residuals, round
        )
        told, residuals = found.parts[PART], found.residuals
    largest = max(float(np.abs(tensor).max()) for tensor in read(blobs, told).values())
    assert largest < 10 * MAX_DIFFERENCE < 1e-18 * np.finfo(np.float32).max


VARIANCES = {"bn1.running_var": np.random.default_rng(0).uniform(0.05, 2, 512).astype(np.float32)}
SHRINKS = [0.1, 1e-3, 1e-5, 0.0]  # in a round; a bfloat16 holds 8 bits of a difference


def shrunk(factor):
    return {name: tensor * np.float32(factor) for name, tensor in VARIANCES.items()}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("factor", SHRINKS)
def test_a_variance_that_shrinks_stays_one(tmp_path, blobs, codec, factor):
    """Where a round publishes it, and where a device uploads it."""
    old, wanted = put(blobs, VARIANCES), shrunk(factor)
    found = publish(config(codec).transfer, blobs, {PART: old}, {PART: put(blobs, wanted)}, {}, seed=1)
    told = tensors.decode(blobs.path(found.parts[PART]), {"bn1.running_var": (512,)})
    one = config(codec)
    sparse = one.model_copy(update={"transfer": one.transfer.model_copy(update={"top_k": 0.01})})
    data = encode(sparse, Turn(1, 1, 0, None), wanted, VARIANCES, tmp_path, pytest.fail)
    update = deltas.decode(data, {"bn1.running_var": (512,)}, codec)
    for variances in (told["bn1.running_var"], VARIANCES["bn1.running_var"] + update["bn1.running_var"]):
        assert (variances >= 0).all()
        assert np.allclose(variances, wanted["bn1.running_var"], rtol=0, atol=2.0**-23)


@pytest.mark.parametrize("codec", [*CODECS, "fp32"])
def test_a_variance_below_zero_is_refused(tmp_path, blobs, codec):
    held, negative = blobs.path(put(blobs, VARIANCES)), shrunk(-0.001)
    data = deltas.encode(shrunk(-1.001), codec, 1.0, 1).data if codec != "fp32" else tensors.encode(negative)
    (tmp_path / "update").write_bytes(data)
    with pytest.raises(InvalidPayload, match="variances below 0"):
        check(config(codec).transfer, [held], tmp_path / "update")


# In a fleet


def test_every_announced_part_is_what_its_patches_make(world, said):
    """Along every way that is announced, in all rounds of both stages; parts of a new stage have none. Residuals last for a stage."""
    fleet = undisturbed(world, "transfer.codec=int8", "stages.rounds_per_stage=3")
    announced, residuals = [], []

    def until():
        run = messages.decode(messages.Run, fleet.broker.retained["lwfed/default/all/run"])
        if run.phase == "training" and (run.stage, run.round) not in [(one.stage, one.round) for one in announced]:
            announced.append(run)
            residuals.append(set(fleet.course.state.residuals))
            for part, steps in run.patches.items():
                for number, step in enumerate(steps):
                    files = [fleet.course.blobs.path(later.blob.id) for later in steps[number:]]
                    patch(
                        fleet.config, part, part_shapes(fleet.config, part), fleet.course.blobs.path(step.base), files, run.parts[part].id
                    )
        return fleet.course.state.over

    fleet.settle(until)
    assert [(run.stage, run.round) for run in announced] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    first, second = (fleet.config.plan(stage).present for stage in (1, 2))
    ways = [{part: len(steps) for part, steps in run.patches.items()} for run in announced]
    assert ways[:4] == [{}, *(dict.fromkeys(first, count) for count in (1, 2, 3))]
    assert ways[4:] == [{**dict.fromkeys(first, 3), "layer.2": count} for count in (1, 2)]
    assert residuals == [set(), set(first), set(first), set(), set(second), set(second)]
    for before, after in itertools.pairwise(announced):
        assert all(after.patches[part][-1].base == before.parts[part].id for part in after.patches)
    assert not of(said, "warning")


def harm(config, task, update, received):
    """First large numbers, of which publishing leaves residuals; then, with the sign turned, all that float32 can say."""
    largest = np.finfo(np.float32).max
    rows = {name: tensor for name, tensor in sorted(update.items()) if tensor.ndim > 1}
    anew = max(float(np.abs(received[name]).max()) for name in rows) < 1e30
    scales = np.full(sum(len(tensor) for tensor in rows.values()), largest / 100.5 if anew else largest, "<f4")
    steps = [drawn(tensor.shape, name) * 40 if anew else -np.sign(received[name]) for name, tensor in rows.items()]
    halves = bytes(2 * sum(tensor.size for tensor in update.values() if tensor.ndim < 2))
    raw = scales.tobytes() + halves + b"".join(tensor.clip(-100, 100).astype(np.int8).tobytes() for tensor in steps)
    return deltas.MAGIC + deltas.zstd.compress(raw, 1)


def test_a_device_that_would_make_the_model_infinite_ends_no_run(world, said):
    """Each of its differences is finite, and what it makes of the model too; what publishing left of one and the next are not."""
    fleet = world("transfer.codec=int8", "calibration.every=never", "rounds.quorum=0.5", "stages.rounds_per_stage=3")
    fleet.start()
    fleet.join("a")
    harmful = fleet.bring("b", images=10**12)
    harmful.encode = harm
    fleet.finish()
    assert fleet.course.state.phase == "finished"
    assert "content" in harmful.refusals


def test_a_calibration_that_cannot_be_told_is_left_out(world, said, monkeypatch):
    calibrate = NumpyWorker._calibrate

    def far(self, config, job):
        done = calibrate(self, config, job)
        shapes = part_shapes(config, PART)
        self._write(job, PART, {name: np.full(shape, np.finfo(np.float32).max) for name, shape in shapes.items()})
        return done

    monkeypatch.setattr(NumpyWorker, "_calibrate", far)
    undisturbed(world, "transfer.codec=int8").finish()
    told = {one["text"].partition(":")[0].split(maxsplit=1)[1] for one in of(said, "warning")}
    assert told == {"calibration is left out in this round"}


@pytest.mark.parametrize("codec", [*CODECS, "fp32"])
@pytest.mark.parametrize(("times", "refused"), [(9, False), (12, True), (1e15, True)])
def test_an_update_that_has_exploded_is_refused(tmp_path, blobs, codec, times, refused):
    """It is finite, and would make the loss of everybody a NaN."""
    before = weights("old")
    moved = {name: np.full_like(tensor, times) for name, tensor in before.items()}
    moved = {name: tensor * np.float32(norm(before) + 1) / np.float32(norm(moved) / times) for name, tensor in moved.items()}
    after = tensors.encode({name: before[name] + moved[name] for name in before})
    (tmp_path / "update").write_bytes(after if codec == "fp32" else deltas.encode(moved, codec, 1.0, 1).data)
    with pytest.raises(InvalidPayload, match="has exploded") if refused else contextlib.nullcontext():
        check(config(codec).transfer, [blobs.path(put(blobs, before))], tmp_path / "update")


def norm(held):
    return np.sqrt(sum(np.square(tensor, dtype=np.float64).sum() for tensor in held.values()))
