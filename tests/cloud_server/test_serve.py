import pytest
from PIL import Image

from lwfed.cloud_server.serve import check_sizes, check_sources
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
def test_what_cannot_travel_is_found_before_anybody_trains(settings, names):
    with pytest.raises(ConfigError, match=r"cannot travel in pieces of \d+: .* fewer layers per stage") as caught:
        check_sizes(load_config("paper", settings))
    assert names in str(caught.value)


@pytest.mark.parametrize("settings", [[], ["stages.strategy=end_to_end"], ["stages.strategy=progressive"], WIDE])
def test_the_paper_s_models_and_wide_ones_layer_by_layer_can_travel(settings):
    check_sizes(load_config("paper", settings))


def test_images_for_evaluation_need_classes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "flat.png")
    with pytest.raises(DataError, match="into a sub-folder"):
        check_sources(load_config("demo", [f"evaluation.data={tmp_path}"]))
