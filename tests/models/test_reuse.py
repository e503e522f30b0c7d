import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lwfed.config import load_config
from lwfed.errors import ConfigError
from lwfed.models import features
from lwfed.models.features import Folder, Memory
from lwfed.models.initial import init_parts
from lwfed.models.local import device_task, train_local
from lwfed.models.prefix import TorchPrefix
from lwfed.models.reuse import FeatureCache, Reuse, Views, reuse
from lwfed.models.step import Means, frozen_tokens, prepare
from lwfed.plan import part_of

RECORD = 2 * (4 * 16 * 2 + 4)  # bytes: views, tokens, width, float16, CRC-32
EVERYWHERE = 1e9
BOUND = {"fp16": 1e-3, "int8": 3e-2}  # after three roundings


class Counting(TorchPrefix):
    """Adds up how many images went through how many layers."""

    def __init__(self, *given):
        super().__init__(*given)
        self.count = 0

    def __call__(self, x, skip):
        self.count += len(x) * (self._layers - len(skip))
        return super().__call__(x, skip)


@pytest.fixture
def device(tiny, images, tmp_path):
    """A device with 20 images that trains rounds of stages from the same first weights."""

    class Device:
        def __init__(self, *settings, config=None):
            self.config = config or tiny("train={epochs: 1, views_per_round: 2}", *settings)
            self.folder = tmp_path / "features"
            stages = range(1, self.config.stage_count + 1)
            self.tensors = {part: init_parts(self.config, [part]) for stage in stages for part in self.config.plan(stage).present}

        def train(self, stage, round=1, room=EVERYWHERE, marks="abcdef", cached=True, on_rows=None, before=None, place=None, micro_batch=4):
            """The update; what the prefix did is in `work`. `marks` are the digests of the frozen parts."""
            plan = self.config.plan(stage)
            tensors = {name: tensor for part in plan.present for name, tensor in self.tensors[part].items()}
            model = prepare(self.config, tensors, plan.trained).online
            prefix = Counting(model, len(plan.frozen) - 1)
            parts, self.told = tuple(marks[: len(plan.frozen)]), []
            cache = FeatureCache(place or Folder(self.folder, room, raises_room="allow more"), parts, self.told.append) if cached else None
            task = device_task(self.config, plan, 10 * stage + round, self.config.place(stage, round), reuse(self.config, plan, 0, round))
            count = iter(range(10**6))

            def on_step(report):
                if before and next(count) == 0:
                    before()

            trained, _ = train_local(
                self.config, task, tensors, images, on_step, means=Means(prefix, micro_batch), cache=cache, on_rows=on_rows
            )
            self.work = prefix.count
            return {name: tensor.numpy().tobytes() for name, tensor in trained.items()}

        def weights(self, update):
            """What the tensors of `update` were before."""
            return np.concatenate([self.tensors[part_of(name)][name].numpy().ravel() for name in update])

        @property
        def files(self):
            return sorted(self.folder.iterdir())

    return Device


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


@pytest.mark.parametrize("room", [0, 13 * RECORD + 5])
def test_what_has_no_room_is_computed_each_time(device, room):
    one = device("train.epochs=3")
    one.train(3, room=room)
    assert one.files[0].stat().st_size == room // RECORD * RECORD
    assert one.work > 2 * (room // RECORD) * 2 + 2
    (text,) = one.told
    assert f"those of {40 - room // RECORD} of 40 pairs are computed each time; allow more" in text
    limited = one.train(3, room=room)
    assert limited == one.train(3)
    assert one.files[0].stat().st_size == 40 * RECORD  # there is room now
    one.train(3)
    assert one.work == 2


def test_where_the_configuration_gives_no_room_it_is_that_which_is_named(device):
    one = device("train.features_mb=0")
    one.train(3, room=0)
    assert one.told[0].endswith("those of 40 of 40 pairs are computed each time; raise train.features_mb from 0 to 1")


def test_where_the_disk_has_no_room_it_is_the_disk_that_is_named(device, monkeypatch):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=13 * RECORD / features.FREE_SHARE))
    one = device()
    one.train(3, room=30 * RECORD)
    assert one.told[0].endswith("those of 27 of 40 pairs are computed each time; free some space on the disk of the state directory")


def test_where_memory_has_no_room_it_is_memory_that_is_named(device, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(features, "_fill", no_memory)
    one = device()
    one.train(3, place=Memory(EVERYWHERE))
    assert one.told[0].endswith("those of 40 of 40 pairs are computed each time; free some memory")


def test_a_file_that_leaves_no_room_for_the_next_one_goes_first(device):
    one = device()
    one.train(2, room=60 * RECORD)
    one.train(3, room=60 * RECORD)
    assert one.work == 2 * 80 + 2
    assert [file.stat().st_size for file in one.files] == [40 * RECORD]


def test_a_kill_while_the_file_is_made_changes_nothing(device):
    one = device()
    one.train(2)
    undisturbed = one.train(3)
    for file in one.files:
        file.unlink()
    one.train(2)
    (one.folder / "0-0.part").write_bytes(bytes(39 * RECORD))
    assert one.train(3, room=85 * RECORD) == undisturbed
    assert one.work == 80 + 2  # through what is new only
    assert len(one.files) == 1


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_bytes(b"short")])
def test_a_file_that_is_lost_while_it_trains_costs_time_only(device, spoil):
    one = device("train.epochs=3")
    whole = one.train(3)
    assert one.train(3, on_rows=None, before=lambda: spoil(one.files[0])) == whole
    assert one.work > 80


def flip(file, *at):
    content = bytearray(file.read_bytes())
    for one in at:
        content[one] ^= 1
    file.write_bytes(content)


def test_what_is_damaged_is_computed_anew_put_right_and_said(device):
    one = device()
    whole = one.train(3)
    kept = one.files[0].read_bytes()
    flip(one.files[0], 3, 21 * RECORD - 1, 21 * RECORD)  # tokens, a checksum, tokens
    assert one.train(3) == whole
    assert one.told == [
        "features of views that are used again have been damaged: they are computed anew; check the disk of the state directory"
    ]
    assert 2 < one.work <= 2 * 2 * 2 * 8 + 2, "two layers for two views of two batches at most, and not of all rows"
    for round in range(2, 12):
        one.train(3, round=round)  # until each row has been drawn
    assert one.files[0].read_bytes() == kept
    one.train(3)
    assert (one.work, one.told) == (2, [])


def test_what_was_damaged_is_not_passed_on_to_the_next_stage(device):
    one = device()
    one.train(2)
    flip(one.files[0], 5 * RECORD)
    rolled = one.train(3)
    assert one.work == 80 + 8 + 2  # one layer for all, and another for the first view of a batch
    assert len(one.told) == 1
    shutil.rmtree(one.folder)
    assert rolled == one.train(3)


def test_int8_damaged_is_computed_with_what_it_was_computed_with(device, monkeypatch):
    """ONNX Runtime's int8 has scales of a micro-batch: here any row changes the others."""
    through = Counting.__call__
    monkeypatch.setattr(Counting, "__call__", lambda self, x, skip: through(self, x, skip) + x.mean())
    one = device()
    whole = one.train(3)
    flip(one.files[0], *range(0, 40 * RECORD, RECORD))
    assert one.train(3) == whole
    assert one.work > 2


def test_a_folder_that_cannot_be_made_costs_time_only(device):
    one = device("train.epochs=3")
    one.folder.write_text("in the way")
    one.train(3)
    assert one.work > 2 * 80
    Folder(one.folder).forget()


def test_a_disk_that_takes_no_file_is_said_by_its_own_words(device, monkeypatch):
    """As one that has no inode left, which other files are found on all the same."""
    one, opened = device(), Path.open

    def refuse(path, mode="r", *given, **named):
        if "w" in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opened(path, mode, *given, **named)

    monkeypatch.setattr(Path, "open", refuse)
    one.train(3)
    assert one.told == ["features of views that are used again cannot be kept (No space left on device): they are computed each time"]


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
