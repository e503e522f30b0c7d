"""Local training, called as the worker calls it."""

import numpy as np
import pytest

from lwfed.config import load_config
from lwfed.data.load import device_images
from lwfed.edge_agent import trainer
from lwfed.errors import InvalidPayload
from lwfed.models.initial import init_part
from lwfed.wire import tensors

from .test_agent import CONFIG, SMALL


def test_parts_that_do_not_fit_the_stage_are_refused(tmp_path):
    with pytest.raises(InvalidPayload, match="needs the parts"):
        trainer.load_parts(CONFIG, 1, {"stem": tmp_path})


def test_the_schedule_runs_over_the_whole_run():
    places = [CONFIG.place(stage, round) for stage, count in enumerate(CONFIG.round_counts, 1) for round in range(1, count + 1)]
    assert [place.round for place in places] == list(range(sum(CONFIG.round_counts)))
    assert {place.rounds for place in places} == {len(places)}


def test_devices_stages_and_rounds_have_streams_of_their_own():
    parts = {name: tensor for part in CONFIG.plan(1).present for name, tensor in init_part(CONFIG, part).items()}
    pixels = device_images("digits", CONFIG, 0).pixels[:32]

    def digest(participant, round):
        return tensors.encode(trainer.train(CONFIG, 1, round, participant, parts, pixels)[0])

    assert digest(0, 1) == digest(0, 1)
    assert len({digest(0, 1), digest(1, 1), digest(0, 2)}) == 3


def test_the_announced_part_of_the_rate_is_that_of_the_training():
    config = load_config("demo", [*SMALL, "train.lr_schedule=plateau"])
    parts = {name: tensor for part in config.plan(1).present for name, tensor in init_part(config, part).items()}
    pixels = device_images("digits", config, 0).pixels[:32]

    def change(lr_scale):
        trained, _ = trainer.train(config, 1, 1, 0, parts, pixels, lr_scale=lr_scale)
        return sum(float(np.abs(array - parts[name].numpy()).sum()) for name, array in trained.items())

    assert change(1e-9) < 1e-3 * change(0.5) < 1e-3 * change(1.0)
