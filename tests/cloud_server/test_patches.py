"""Parts and updates as differences: what the server makes of them is what every device makes of them."""

import hashlib
import itertools

import numpy as np
import pytest

from lwfed.blobs import BlobStore
from lwfed.cloud_server.patches import publish
from lwfed.cloud_server.weights import as_weights, check
from lwfed.config import load_config
from lwfed.edge_agent.trainer import encode, patch
from lwfed.errors import Diverged, InvalidPayload
from lwfed.models.shapes import part_shapes
from lwfed.wire import deltas, messages, tensors

from .conftest import drawn
from .fleets import of, undisturbed

CODECS = ("int8", "bf16")
PART = "layer.1"


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
    made = patch(one, PART, blobs.path(base), [blobs.path(data)], found.parts[PART])
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
    with pytest.raises(Diverged, match=r"lower train\.lr or calibration\.lr"):
        publish(config().transfer, blobs, {PART: old}, {PART: put(blobs, far)}, {}, seed=1)


@pytest.mark.parametrize("codec", CODECS)
def test_updates_are_weights_as_long_as_they_are_looked_at(tmp_path, blobs, codec):
    received, step = weights("old"), weights("step", 0.01)
    (tmp_path / "update").write_bytes(deltas.encode(step, codec, 1.0, 1)[0])
    held = blobs.path(put(blobs, received))
    check(config(codec).transfer, [held], tmp_path / "update")
    with as_weights(config(codec).transfer, [held], [tmp_path / "update"], tmp_path / "weights") as (file,):
        found = tensors.decode(file, part_shapes(config(), PART))
        assert all(np.allclose(found[name], received[name] + step[name], atol=0.01 * 4 / 63) for name in step)
    assert not (tmp_path / "weights").exists()


def test_a_difference_that_leads_beyond_float32_is_refused(tmp_path, blobs):
    """As a second one of a device that does harm: the model is large already."""
    large = {name: np.full_like(tensor, 3e38) for name, tensor in weights("old").items()}
    (tmp_path / "update").write_bytes(deltas.encode(large, "int8", 1.0, 1)[0])
    check(config().transfer, [blobs.path(put(blobs, weights("old")))], tmp_path / "update")
    with pytest.raises(InvalidPayload, match="not finite once its difference is added"):
        check(config().transfer, [blobs.path(put(blobs, large))], tmp_path / "update")


VARIANCES = {"bn1.running_var": np.random.default_rng(0).uniform(0.05, 2, 512).astype(np.float32)}
SHRINKS = [0.1, 1e-3, 1e-5, 0.0]  # in a round; a bfloat16 holds 8 bits of a difference


def shrunk(factor):
    return {name: tensor * np.float32(factor) for name, tensor in VARIANCES.items()}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("factor", SHRINKS)
def test_a_variance_that_shrinks_stays_one(blobs, codec, factor):
    """Where a round publishes it, and where a device uploads it."""
    old, wanted = put(blobs, VARIANCES), shrunk(factor)
    found = publish(config(codec).transfer, blobs, {PART: old}, {PART: put(blobs, wanted)}, {}, seed=1)
    told = tensors.decode(blobs.path(found.parts[PART]), {"bn1.running_var": (512,)})
    one = config(codec)
    sparse = one.model_copy(update={"transfer": one.transfer.model_copy(update={"top_k": 0.01})})
    data, _ = encode(sparse, 1, 1, 0, wanted, VARIANCES, None)
    update = deltas.decode(data, {"bn1.running_var": (512,)}, codec)
    for variances in (told["bn1.running_var"], VARIANCES["bn1.running_var"] + update["bn1.running_var"]):
        assert (variances >= 0).all()
        assert np.allclose(variances, wanted["bn1.running_var"], rtol=0, atol=2.0**-23)


@pytest.mark.parametrize("codec", [*CODECS, "fp32"])
def test_a_variance_below_zero_is_refused(tmp_path, blobs, codec):
    held, negative = blobs.path(put(blobs, VARIANCES)), shrunk(-0.001)
    data = deltas.encode(shrunk(-1.001), codec, 1.0, 1)[0] if codec != "fp32" else tensors.encode(negative)
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
                    patch(fleet.config, part, fleet.course.blobs.path(step.base), files, run.parts[part].id)
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


def test_a_device_that_would_make_the_model_infinite_ends_no_run(world, said):
    """Each of its differences is finite; the second one added to what the first has made is not."""
    fleet = world("transfer.codec=int8", "calibration.every=never", "rounds.quorum=0.5")
    fleet.start()
    fleet.join("a")
    harmful = fleet.bring("b", images=100_000)
    harmful.encode = lambda config, update, received: deltas.encode(
        {name: np.full_like(tensor, 3e38) for name, tensor in update.items()}, "int8", 1.0, 1
    )[0]
    fleet.finish()
    assert fleet.course.state.phase == "finished"
    assert "not_finite" in harmful.refusals
