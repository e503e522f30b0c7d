import math

import pytest

from lwfed.config import load_config
from lwfed.models.shapes import part_shapes
from lwfed.plan import by_part, in_model_order, layer_counts, part_of, round_counts, stage_plan

TAIL = ("norm", "projector", "predictor")
L1, L2, L3, L4 = (f"layer.{number}" for number in range(1, 5))


@pytest.mark.parametrize(
    ("strategy", "stage", "per_stage", "added", "frozen", "trained"),
    [
        ("layer_wise", 1, 1, ("stem", L1, *TAIL), (), ("stem", L1, *TAIL)),
        ("layer_wise", 2, 1, (L2,), ("stem", L1), (L2, *TAIL)),
        ("layer_wise", 4, 1, (L4,), ("stem", L1, L2, L3), (L4, *TAIL)),
        ("layer_wise", 2, 2, (L3, L4), ("stem", L1, L2), (L3, L4, *TAIL)),
        ("layer_wise", 2, 3, (L4,), ("stem", L1, L2, L3), (L4, *TAIL)),  # the last stage takes what is left
        ("progressive", 1, 1, ("stem", L1, *TAIL), (), ("stem", L1, *TAIL)),
        ("progressive", 3, 1, (L3,), (), ("stem", L1, L2, L3, *TAIL)),
        ("progressive", 2, 2, (L3, L4), (), ("stem", L1, L2, L3, L4, *TAIL)),
        ("end_to_end", 1, 1, ("stem", L1, L2, L3, L4, *TAIL), (), ("stem", L1, L2, L3, L4, *TAIL)),
    ],
)
def test_table_1(strategy, stage, per_stage, added, frozen, trained):
    plan = stage_plan(strategy, stage, depth=4, layers_per_stage=per_stage)
    assert (plan.added, plan.frozen, plan.trained) == (added, frozen, trained)
    assert plan.uploaded == plan.downloaded == trained
    assert plan.calibrated == ()
    assert plan.present == in_model_order({*frozen, *trained})


@pytest.mark.parametrize(
    ("scope", "every", "calibrated", "downloaded"),
    [
        ("model", "never", (), (L2, *TAIL)),
        ("model", "stage", ("stem", L1, L2, *TAIL), (L2, *TAIL)),
        ("model", "round", ("stem", L1, L2, *TAIL), ("stem", L1, L2, *TAIL)),
        ("active", "stage", (L2, *TAIL), (L2, *TAIL)),
        ("active", "round", (L2, *TAIL), (L2, *TAIL)),
    ],
)
def test_calibration_decides_what_the_server_trains_and_what_travels_again(scope, every, calibrated, downloaded):
    plan = stage_plan("layer_wise", 2, depth=4, scope=scope, every=every)
    assert (plan.calibrated, plan.downloaded, plan.uploaded) == (calibrated, downloaded, (L2, *TAIL))


@pytest.mark.parametrize(
    ("strategy", "per_stage", "gigabytes"),
    [
        ("end_to_end", 1, 8.40),  # Table 2
        ("layer_wise", 1, 1.66),
        ("progressive", 1, 5.04),
        ("layer_wise", 2, 2.27),  # Table 3
        ("layer_wise", 3, 2.88),
        ("layer_wise", 4, 3.49),
        ("layer_wise", 6, 4.71),
        ("progressive", 2, 5.35),
        ("progressive", 3, 5.65),
        ("progressive", 4, 5.96),
        ("progressive", 6, 6.57),
    ],
)
def test_the_paper_s_communication_follows_from_the_plans(strategy, per_stage, gigabytes):
    config = load_config("paper", [f"stages.strategy={strategy}", f"stages.layers_per_stage={per_stage}"])
    stages = len(layer_counts(strategy, 12, per_stage))
    plans = [config.plan(stage) for stage in range(1, stages + 1)]
    travelling = [part for plan in plans for part in (*plan.downloaded, *plan.uploaded)]
    parameters = sum(math.prod(shape) for part in travelling for shape in part_shapes(config, part).values())
    assert parameters * 4 * 180 / stages / 2**20 / 1000 == pytest.approx(gigabytes, rel=0.015)


def test_every_layer_is_added_and_trained_exactly_once_layer_wise():
    for depth in range(1, 13):
        for per_stage in range(1, depth + 1):
            stages = range(1, len(layer_counts("layer_wise", depth, per_stage)) + 1)
            plans = [stage_plan("layer_wise", stage, depth, per_stage) for stage in stages]
            trained = [part for plan in plans for part in plan.trained if part.startswith("layer.")]
            assert trained == [f"layer.{number}" for number in range(1, depth + 1)]
            assert [part for plan in plans for part in plan.added if part not in TAIL] == ["stem", *trained]
            assert all(set(plan.frozen).isdisjoint(plan.trained) for plan in plans)


def test_end_to_end_gets_the_rounds_of_all_stages():
    assert round_counts("end_to_end", 12, 1, 15) == (180,)
    assert round_counts("layer_wise", 12, 1, 15) == (15,) * 12
    assert round_counts("end_to_end", 4, [1, 3], [2, 5]) == (7,)
    assert round_counts("progressive", 4, [1, 3], [2, 5]) == (2, 5)


@pytest.mark.parametrize("counts", [[1, 2], [5], [0, 4], []])
def test_listed_layers_that_do_not_make_up_the_encoder_are_refused(counts):
    with pytest.raises(ValueError, match="adds"):
        layer_counts("layer_wise", 4, counts)


def test_rounds_are_dealt_evenly_where_stages_have_none_of_their_own():
    assert round_counts("layer_wise", 12, 1, None, 180) == (15,) * 12
    assert round_counts("layer_wise", 12, 6, None, 180) == (90, 90)
    assert round_counts("progressive", 4, [1, 1, 2], None, 8) == (3, 3, 2)
    assert round_counts("end_to_end", 4, [1, 1, 2], None, 8) == (8,)
    with pytest.raises(ValueError, match="cannot be dealt to 4 stages"):
        round_counts("layer_wise", 4, 1, None, 3)


def test_listed_rounds_must_be_one_number_a_stage():
    with pytest.raises(ValueError, match="lists 1 stages"):
        round_counts("layer_wise", 4, [1, 3], [2])


def test_overlap_trains_earlier_layers_once_more():
    plan = stage_plan("layer_wise", 3, depth=4, overlap=1)
    assert (plan.frozen, plan.trained, plan.added) == (("stem", L1), (L2, L3, *TAIL), (L3,))
    assert stage_plan("layer_wise", 1, depth=4, overlap=1) == stage_plan("layer_wise", 1, depth=4)
    assert stage_plan("layer_wise", 2, depth=4, overlap=9).frozen == ("stem",)


def test_an_adapter_lives_in_the_stages_that_end_with_its_layer():
    plans = [stage_plan("layer_wise", stage, depth=4, tail=TAIL[1:], adapted=(1, 2, 3)) for stage in (1, 2, 4)]
    assert [[part for part in plan.present if part.startswith("adapter")] for plan in plans] == [["adapter.1"], ["adapter.2"], []]
    assert plans[1].trained == (L2, "adapter.2", "projector", "predictor")


@pytest.mark.parametrize(("strategy", "stage"), [("layer_wise", 0), ("layer_wise", 5), ("end_to_end", 2)])
def test_a_stage_that_does_not_exist_is_refused(strategy, stage):
    with pytest.raises(ValueError, match="has stages 1 to"):
        stage_plan(strategy, stage, depth=4)


def test_tensors_are_sorted_into_parts_by_their_timm_names():
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.11.mlp.fc2.bias", "fc_norm.weight"]
    assert [part_of(name) for name in names] == ["stem", "stem", "stem", "layer.1", "layer.12", "norm"]
    assert by_part({"projector.0.weight": 1, "norm.bias": 2, "projector.1.bias": 3}) == {
        "projector": {"projector.0.weight": 1, "projector.1.bias": 3},
        "norm": {"norm.bias": 2},
    }
    with pytest.raises(ValueError, match="no part"):
        part_of("blocks.x.weight")
