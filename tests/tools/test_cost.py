import json

import pytest
from click.testing import CliRunner

from lwfed.config import load_config
from lwfed.tools.cli import main
from lwfed.tools.cost.report import make_report

CLOSE = 0.015
# arXiv 2401.11647, Table 2 (GFLOPs, GB) and Table 5 (GB at worst).
TABLE_2 = {
    ("moco_v3", "end_to_end"): (586, 8.40),
    ("moco_v3", "layer_wise"): (139, 1.66),
    ("moco_v3", "progressive"): (318, 5.04),
    ("byol", "end_to_end"): (586, 8.40),
    ("byol", "layer_wise"): (139, 1.66),
    ("byol", "progressive"): (318, 5.04),
    ("simclr", "end_to_end"): (1169, 8.03),
    ("simclr", "layer_wise"): (278, 1.29),
    ("simclr", "progressive"): (635, 4.68),
}
TABLE_3 = {
    "layer_wise": {1: (139, 1.66), 2: (180, 2.27), 3: (220, 2.88), 4: (261, 3.49), 6: (342, 4.71)},
    "progressive": {1: (318, 5.04), 2: (342, 5.35), 3: (367, 5.65), 4: (391, 5.96), 6: (440, 6.57)},
}
TABLE_5_LAYER_WISE = 3.35
TOTALS = {"gflops_paper", "gflops_true", "comm_gb_paper", "comm_gb_paper_worst", "comm_bytes", "comm_ratio", "memory_mb"}


def totals(preset, *settings):
    return make_report(load_config(preset, settings))["totals"]


@pytest.fixture(scope="module")
def paper():
    return make_report(load_config("paper"))


@pytest.mark.parametrize("method", ["moco_v3", "byol", "simclr"])
def test_table_2(method):
    found = totals("paper", f"ssl.method={method}")
    for strategy, one in found.items():
        gflops, gb = TABLE_2[method, strategy]
        assert one["gflops_paper"] == pytest.approx(gflops, rel=CLOSE)
        assert one["comm_gb_paper"] == pytest.approx(gb, rel=CLOSE)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 6])
def test_table_3(layers):
    found = totals("paper", f"stages.layers_per_stage={layers}")
    for strategy, rows in TABLE_3.items():
        gflops, gb = rows[layers]
        assert found[strategy]["gflops_paper"] == pytest.approx(gflops, rel=CLOSE)
        assert found[strategy]["comm_gb_paper"] == pytest.approx(gb, rel=CLOSE)
