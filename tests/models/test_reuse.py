import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from lwfed.config import load_config
from lwfed.errors import ConfigError
from lwfed.models.features import Folder, Memory
from lwfed.models.initial import init_parts
from lwfed.models.reuse import FeatureCache, Reuse, Views, reuse
from lwfed.models.step import frozen_tokens, prepare
from lwfed.plan import part_of

from .reusing import EVERYWHERE, RECORD, Counting

BOUND = {"fp16": 1e-3, "int8": 3e-2}  # after three roundings


def flat(update):
    return np.concatenate([np.frombuffer(data, np.float32) for data in update.values()])


def make_views(config, images, stage=3, seed=5):
    plan = config.plan(stage)
    branches = prepare(config, init_parts(config, plan.present), plan.trained)
    choose = lambda indices: torch.from_numpy(images[indices.numpy()])  # noqa: E731
    return Views(config, Reuse(config.train.views_per_round, seed, (1, 2)), branches, len(images), choose), branches


@pytest.mark.parametrize("kept_as", ["fp16", "int8"])
@pytest.mark.parametrize("method", ["moco_v3", "simclr", "byol", "mae"])
def test_tokens_are_what_the_prefix_gives_for_the_views_of_the_batch(tiny, images, tmp_path, method, kept_as):
    config = tiny("train.views_per_round=3", f"ssl.method={method}", "ssl.decoder_width=32", f"train.features_as={kept_as}")
    views, branches = make_views(config, images)
    indices = torch.tensor([7, 3, 19, 0])
    without = views.batch(1, 0, indices)
    views.keep(FeatureCache(Folder(tmp_path / "kept"), ("a", "b", "c")), "images")
    batch = views.batch(1, 0, indices)
    for number, tokens in enumerate(batch.tokens):
        expected = frozen_tokens(branches, replace(batch, tokens=None), config, number)
        assert tokens.dtype == torch.float16
        assert (tokens.float() - expected).norm() <= BOUND[kept_as] * expected.norm()
        assert (without.tokens[number] - tokens).norm() <= BOUND[kept_as] * expected.norm()


def test_each_image_has_so_many_first_and_second_views_that_combine(tiny, images):
    views, _ = make_views(tiny("train.views_per_round=2"), images)
    seen = [set(), set(), set()]
    for step in range(60):
        batch = views.batch(1, step, torch.tensor([4, 11]))
        keys = [(tuple(params.boxes[1].tolist()), params.amounts[1, 0].item()) for params in batch.views]
        for found, key in zip(seen, (*keys, tuple(keys)), strict=True):
            found.add(key)
    assert [len(found) for found in seen] == [2, 2, 4]


def test_every_seed_and_every_row_has_views_of_its_own(tiny, images, monkeypatch):
    monkeypatch.setattr("lwfed.models.reuse.ROWS_AT_ONCE", 8)
    config = tiny("train.views_per_round=1")
    amounts = []
    for seed in (5, 6):
        views = make_views(config, images, seed=seed)[0].batch(1, 0, torch.arange(20)).views
        amounts += [tuple(one.tolist()) for params in views for one in params.amounts]
    assert len(set(amounts)) == len(amounts) == 80


def test_the_file_is_made_once_and_a_device_that_lost_it_computes_the_same(device):
    one = device()
    shown = []
    first = one.train(3, on_rows=lambda done, total: shown.append((done, total)))
    assert shown[-1] == (40, 40)
    assert one.work == 2 * (2 * 40 + 1 * 0) + 2 * 1  # two layers for two views of 20 images in two pairs, and once for the shape
    again = one.train(3)
    assert one.work == 2
    shutil.rmtree(one.folder)
    assert first == again == one.train(3)
    assert [file.stat().st_size for file in one.files] == [40 * RECORD]


@pytest.mark.parametrize("kept_as", ["fp16", "int8"])
def test_rounds_and_stages_have_the_same_views_which_go_through_what_is_new_only(device, kept_as):
    one = device(f"train.features_as={kept_as}")
    one.train(2)
    one.train(2, round=2)
    assert one.work == 1
    rolled = one.train(3)
    assert one.work == 2 * 40 + 2  # one layer of two
    assert len(one.files) == 1
    kept = one.files[0].read_bytes()
    shutil.rmtree(one.folder)
    assert rolled == one.train(3)  # a device that lost it, or came later
    assert kept == one.files[0].read_bytes()


@pytest.mark.slow
def test_layers_that_give_other_shapes_go_on_from_what_was_kept(device):
    pytest.importorskip("timm")
    settings = ["model.image_size=8", "train={batch_size: 8, epochs: 2, views_per_round: 1, prefix: torch}", "stages.rounds_per_stage=2"]
    one = device(config=load_config("resnet18", [*settings, "calibration.every=never", "evaluation.data=null"]))
    one.train(3, micro_batch=None)
    rolled = one.train(4, micro_batch=None)
    assert one.work == 2 * 20 + 3
    shutil.rmtree(one.folder)
    assert rolled == one.train(4, micro_batch=None)


def test_a_prefix_that_changed_is_computed_anew_and_the_old_one_forgotten(device):
    one = device()
    one.train(3)
    (before,) = one.files
    one.train(3, marks="axcdef")
    assert one.work == 2 * 80 + 2
    assert len(one.files) == 1
    assert one.files != [before]


def test_where_calibration_moves_the_prefix_views_are_of_the_round(tiny):
    moving = tiny("train.views_per_round=2", "calibration.every=round", "calibration.data=digits")
    still = tiny("train.views_per_round=2")
    at_ends = tiny("train.views_per_round=2", "calibration.every=stage", "calibration.data=digits")
    assert reuse(moving, moving.plan(2), 0, 1).seed != reuse(moving, moving.plan(2), 0, 2).seed
    for config in (still, at_ends):
        assert len({reuse(config, config.plan(stage), 0, round).seed for stage in (2, 3) for round in (1, 2)}) == 1
        assert reuse(config, config.plan(2), 1, 1).seed != reuse(config, config.plan(2), 0, 1).seed
    assert reuse(still, still.plan(1), 0, 1) is None  # nothing is frozen
    assert reuse(tiny(), tiny().plan(2), 0, 1) is None
    progressive = tiny("train.views_per_round=2", "stages.strategy=progressive")
    assert reuse(progressive, progressive.plan(2), 0, 1) is None


def test_int8_takes_less_place_and_leads_almost_to_the_same_weights(device):
    halves, bytes_ = device(), device("train.features_as=int8")
    exact, other, less = halves.train(3), halves.train(3, round=2), bytes_.train(3)
    assert [file.stat().st_size for file in bytes_.files] == [40 * 2 * (4 * 16 + 2 * 16 + 4)]
    assert less.keys() == exact.keys()
    start = halves.weights(exact)
    moved, away = (np.linalg.norm(flat(exact) - one) for one in (start, flat(less)))
    assert 0 < away < 0.3 * moved
    assert np.linalg.norm(flat(exact) - flat(other)) > moved, "what another seed makes is further off"


def test_memory_gives_the_bits_of_a_file_and_leaves_none(device):
    one = device("train.epochs=3")
    in_file, place = one.train(3), Memory(EVERYWHERE)
    shutil.rmtree(one.folder)
    assert one.train(3, place=place) == in_file
    assert one.train(3, place=place) == in_file
    assert one.work == 1 * 2
    assert not one.folder.exists()
    assert one.train(3, place=Memory(13 * RECORD)) == in_file
    assert one.work > 2 * 80


def test_what_was_computed_in_another_way_is_no_beginning_and_that_is_said(device):
    """A device that lost what it kept could not repeat it."""
    one = device()
    one.train(2)
    assert one.told == []
    expected = device().train(3, micro_batch=8, place=Memory(EVERYWHERE))
    assert one.train(3, micro_batch=8) == expected
    assert one.work == 2 * 80 + 2
    (said,) = one.told
    assert said.endswith(
        "computed anew: those kept are by torch with 4 images at a time, and not by torch with 8 images at a time, which rounds otherwise"
    )
    one.train(3, round=2, micro_batch=8)
    one.train(3, marks="zzzzzz", micro_batch=8)
    assert one.told == [], "other weights are no news"
    assert len(one.files) == 1


def test_what_another_onnx_runtime_has_computed_is_computed_anew(device, monkeypatch):
    one = device()
    monkeypatch.setattr(Counting, "runtime", "1.20")
    one.train(3)
    one.train(3, round=2)
    assert one.work == 2
    monkeypatch.setattr(Counting, "runtime", "1.21")
    one.train(3)
    assert one.work == 2 * 80 + 2
    assert one.told[0].endswith("of another version or setting, which rounds otherwise")


def test_training_goes_on_with_reused_views_as_without_a_cache(device):
    one = device()
    cached, plain = one.train(3), one.train(3, cached=False)
    frozen = set(one.config.plan(3).frozen)
    assert all(part_of(name) not in frozen for name in cached)
    assert cached == plain


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["stages.depth_dropout=0.5"], "depth_dropout to 0"),
        (
            ["train.epochs=2", "calibration.every=round", "calibration.data=digits"],
            "nothing: frozen layers are the same for 2 epochs",
        ),
        (["train.epochs=1", "stages.rounds_per_stage=2"], "are the same for 2 epochs"),
    ],
)
def test_settings_that_contradict_reuse_are_refused(tiny, settings, words):
    with pytest.raises(ConfigError, match=words):
        tiny("train.views_per_round=2", *settings)
