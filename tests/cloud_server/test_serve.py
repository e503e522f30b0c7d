import pytest
from PIL import Image

from lwfed.cloud_server.serve import check_sources
from lwfed.cloud_server.sizes import run_chunk_bytes
from lwfed.cloud_server.torch_jobs import foreseen
from lwfed.config import load_config
from lwfed.errors import ConfigError, DataError

WIDE = ["model.width=1024", "model.heads=16", "model.depth=12"]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ([*WIDE, "stages.strategy=end_to_end"], "layer.12"),
        ([*WIDE, "stages.layers_per_stage=4"], "layer.4"),
        (["transfer.chunk_bytes=1024"], "layer.1,"),
    ],
)
def test_what_cannot_travel_is_found_with_the_first_weights(settings, names):
    config = load_config("paper", settings)
    with pytest.raises(ConfigError, match=r"cannot travel in pieces of \d+: .* fewer layers per stage") as caught:
        run_chunk_bytes(config, foreseen(config), None)
    assert names in str(caught.value)


@pytest.mark.parametrize("settings", [[], ["stages.strategy=end_to_end"], ["stages.strategy=progressive"], WIDE])
def test_the_paper_s_models_and_wide_ones_layer_by_layer_can_travel(settings):
    config = load_config("paper", settings)
    assert run_chunk_bytes(config, foreseen(config), None) == config.transfer.chunk_bytes


@pytest.mark.parametrize("name", ["demo", "paper", "cifar10"])
def test_the_limit_that_is_asked_for_is_enough(name):
    config = load_config(name)
    parts = foreseen(config)
    with pytest.raises(ConfigError) as caught:
        run_chunk_bytes(config, parts, 2000)
    enough = int(str(caught.value).rsplit(" ", 1)[1])
    for limit in (enough, 20_000_000, None):
        assert run_chunk_bytes(config, parts, limit) == config.transfer.chunk_bytes


def test_of_a_run_that_goes_on_the_stage_at_hand_is_looked_at():
    config = load_config("paper", [*WIDE, "stages.strategy=progressive"])
    parts = foreseen(config)
    with pytest.raises(ConfigError, match=r"layer\.12"):
        run_chunk_bytes(config, parts, None)
    known = {part: parts[part] for part in config.plan(1).present}
    assert run_chunk_bytes(config, known, None) == config.transfer.chunk_bytes


def test_a_data_set_by_name_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("LWFED_DATASETS", str(tmp_path))
    for key in ("evaluation.data=cifar10", "calibration.data=cifar10"):
        with pytest.raises(DataError, match="`lwfed fetch cifar10`"):
            check_sources(load_config("demo", [key]))


def test_images_for_evaluation_need_classes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "flat.png")
    with pytest.raises(DataError, match="into a sub-folder"):
        check_sources(load_config("demo", [f"evaluation.data={tmp_path}"]))
