import pytest

from lwfed.config import load_config
from lwfed.tools.screen import Screen


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["data.devices=3", "model.depth=2", "stages.rounds_per_stage=2", "train.epochs=2"], "3 devices, 4 rounds of 2 epochs"),
        (["data.devices=1", "model.depth=1", "stages.rounds_per_stage=1", "train.epochs=1"], "1 device, 1 round of 1 epoch"),
    ],
)
def test_what_is_ahead_is_counted_as_people_do(capsys, settings, says):
    with Screen(live=False).run(load_config("demo", settings)):
        pass
    assert capsys.readouterr().out == f"training layer by layer: {says}\n"
