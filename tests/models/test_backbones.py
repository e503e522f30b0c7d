"""What holds for every convolutional backbone of lwfed.backbones, against timm where it has an equal."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from lwfed.backbones import CONVOLUTIONAL
from lwfed.errors import ConfigError, MissingDependency
from lwfed.models import convolutional
from lwfed.models.backbones import build_encoder, load_encoder
from lwfed.models.evaluation.features import features
from lwfed.models.heads import load_network
from lwfed.models.initial import grow, init_parts
from lwfed.models.local import calibration_task, device_task, train_local
from lwfed.models.shapes import part_shapes, shapes
from lwfed.models.ssl import METHODS
from lwfed.models.step import AT_ONCE, Terms, backward, draw_batch, prepare, train_step
from lwfed.plan import by_part, part_of

STATISTICS = ("running_mean", "running_var")
BACKBONES, TWO_VIEWS = list(CONVOLUTIONAL), sorted(set(METHODS) - {"mae"})
PAIRS = [(row, column) for row in range(len(BACKBONES)) for column in range(len(TWO_VIEWS))]


def half(rest):
    """Of the pairs of backbone and method: each of both occurs."""
    return [(BACKBONES[row], TWO_VIEWS[column]) for row, column in PAIRS if (row + column) % 2 == rest]


@pytest.fixture(params=CONVOLUTIONAL)
def conv(request, tiny):
    """A configuration with that backbone; takes settings on top."""
    size = ["model.image_size=16", "model.patch_size=7", "train.epochs=1", "train.batch_size=4"]  # patches are of no concern
    return lambda *settings: tiny(f"model.backbone={request.param}", *size, *settings)


@pytest.fixture
def photos():
    """For two steps: after the first one of a residual block, what its last norm hides has gradients too."""
    return np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8)


def reference(config, layers=None):
    """timm's model with what we leave out taken away, and with weights of ordinary size everywhere."""
    import timm

    model, traits = config.model, CONVOLUTIONAL[config.model.backbone]
    made = timm.create_model(model.backbone, num_classes=0, in_chans=model.channels)
    resnet = hasattr(made, "layer1")
    gone = [f"layer{n + 1}" if resnet else f"blocks.{n}" for n in range(traits.depth if layers is None else layers, traits.depth)]
    for name in (*traits.after, *gone):
        made.set_submodule(name, torch.nn.Identity())
    generator = torch.Generator().manual_seed(1)
    state = made.state_dict()
    for name, tensor in state.items():
        if not name.endswith("num_batches_tracked"):
            drawn = torch.randn(tensor.shape, generator=generator)
            size = 0.3 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
            state[name] = drawn.abs() + 0.5 if name.endswith("running_var") else drawn * size
    made.load_state_dict(state)
    return made.eval()


def without_counts(state):
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def grown(config, stage):
    tensors = {}
    for number in range(1, stage + 1):
        tensors |= grow(config, config.plan(number), tensors)
    return {name: tensor for name, tensor in tensors.items() if part_of(name) in config.plan(stage).present}


def called(config, stage, images, tensors=None, seed=3):
    plan, tensors = config.plan(stage), grown(config, stage) if tensors is None else tensors
    return train_local(config, device_task(config, plan, seed, config.place(stage, 1)), tensors, images, means=AT_ONCE)[0], tensors


def batch(config, count=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return draw_batch(config, 0, 0, images, 0)


def digest(tensors):
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def is_statistic(name):
    return name.endswith(STATISTICS)


@pytest.mark.parametrize(("channels", "size"), [(1, 64), (3, 32)])
def test_the_whole_encoder_is_timm_s(conv, channels, size):
    config = conv(f"model.channels={channels}", f"model.image_size={size}")
    theirs = reference(config)
    ours = load_encoder(config.model, without_counts(theirs.state_dict()))
    assert digest(ours.state_dict()) == digest(without_counts(theirs.state_dict()))
    theirs.load_state_dict(dict(ours.state_dict()))  # names unchanged, nothing missing
    images = torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(0))
    found = ours(images)
    assert found.shape == (3, config.model.width)
    torch.testing.assert_close(found, theirs((images - 0.5) / 0.5), rtol=1e-4, atol=1e-4)
    assert found.std() > 1e-2


def test_a_partial_encoder_is_timm_s_cut_short_with_an_adapter(conv):
    config = conv("model.image_size=32")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for layers in range(1, config.model.depth):
        theirs = reference(config, layers)
        adapter = grown(config, layers)
        adapter = {name: adapter[name] for name in shapes(config, [f"adapter.{layers}"])}
        ours = load_encoder(config.model, {**without_counts(theirs.state_dict()), **adapter})
        expected = theirs((images - 0.5) / 0.5) @ adapter[f"adapter.{layers}.weight"].T + adapter[f"adapter.{layers}.bias"]
        torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)
        assert len(ours.layers()) == layers


def test_prefix_and_rest_are_the_whole(conv):
    config = conv("model.image_size=32")
    encoder = load_encoder(config.model, without_counts(reference(config).state_dict()))
    x = encoder.stem(torch.rand(2, 3, 32, 32))
    for layers in range(config.model.depth + 1):
        assert torch.equal(encoder.through(encoder.through(x, last=layers), layers), encoder.through(x))


def test_weights_begin_as_timm_s(conv):
    import timm

    torch.manual_seed(0)  # of theirs
    for channels in (1, 3):
        config = conv(f"model.channels={channels}", "stages.strategy=end_to_end")
        theirs = timm.create_model(config.model.backbone, num_classes=0, in_chans=channels).state_dict()
        ours = init_parts(config, [part for part in config.plan(1).present if part not in ("projector", "predictor")])
        for name, tensor in ours.items():
            if tensor.ndim == 1:
                assert torch.equal(tensor, theirs[name]), name
            elif tensor.numel() >= 100:
                tolerance = 5 * tensor.numel() ** -0.5  # of the difference of two estimates, in its standard deviations
                assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=tolerance), name


def test_an_adapter_lives_as_long_as_its_layer_is_the_last(conv):
    config = conv()
    for stage in range(1, config.stage_count + 1):
        plan, tensors = config.plan(stage), grown(config, stage)
        adapters = [part for part in by_part(tensors) if part.startswith("adapter")]
        assert adapters == ([f"adapter.{stage}"] if stage < config.stage_count else [])
        assert set(adapters) <= set(plan.added) & set(plan.uploaded)
        assert dict(load_network(config, tensors).state_dict()).keys() == tensors.keys()
        assert features(load_encoder(config.model, tensors), np.zeros((2, 3, 16, 16), np.uint8)).shape == (2, config.model.width)


@pytest.mark.parametrize(
    ("conv", "method", "strategy", "per_stage"),
    [
        (BACKBONES[row], TWO_VIEWS[column], ("layer_wise", "progressive")[(row + column) % 2], 1 + (row + column // 2) % 2)
        for row, column in PAIRS
    ],
    indirect=["conv"],
)
def test_a_local_call_changes_what_is_trained_and_nothing_else(conv, photos, method, strategy, per_stage):
    """Of the four, every pair of values occurs."""
    config = conv(f"ssl.method={method}", f"stages.strategy={strategy}", f"stages.layers_per_stage={per_stage}")
    for stage in sorted({1, 2, config.stage_count}):
        plan = config.plan(stage)
        tensors = grown(config, stage)
        before = digest(tensors)
        trained, _ = called(config, stage, photos, tensors)
        assert digest(tensors) == before
        assert set(by_part(trained)) == set(plan.trained)
        assert trained.keys() == shapes(config, plan.trained).keys()
        for name, tensor in trained.items():
            assert not torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize(("conv", "method"), half(0), indirect=["conv"])
def test_end_to_end_trains_all(conv, photos, method):
    config = conv(f"ssl.method={method}", "stages.strategy=end_to_end")
    assert set(by_part(called(config, 1, photos)[0])) == set(config.plan(1).present)


@pytest.mark.parametrize(("conv", "method"), half(1), indirect=["conv"])
def test_listed_stages_end_with_an_adapter(conv, photos, method):
    counts = [1, conv().model.depth - 2, 1]
    config = conv(f"ssl.method={method}", f"stages.layers_per_stage={counts}")
    assert config.stage_count == 3
    trained, _ = called(config, 2, photos)
    assert f"adapter.{config.model.depth - 1}" in by_part(trained)


@pytest.mark.parametrize("strategy", ["layer_wise", "progressive"])
def test_gradients_reach_what_is_trained_and_nothing_else(conv, strategy):
    config = conv(f"stages.strategy={strategy}", "stages.overlap=1")
    for stage in (1, 3):
        plan = config.plan(stage)
        made = prepare(config, grown(config, stage), plan.trained)
        backward(made, batch(config), config)
        for name, tensor in made.online.named_parameters():
            assert (tensor.grad is not None) == (part_of(name) in plan.trained), name


def test_equal_inputs_give_equal_bits(conv, photos):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = called(conv(), 2, photos)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert digest(called(conv(), 2, photos)[0]) == digest(first)
    assert digest(called(conv(), 2, photos, seed=4)[0]) != digest(first)


def test_frozen_batch_norms_see_no_batch(conv):
    """What the prefix gives for a sample depends on that sample alone; what a trained layer gives does not."""
    config = conv()
    made = prepare(config, grown(config, 2), config.plan(2).trained)
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, alone = (made.online.through(made.online.stem(some), last=1) for some in (x, x[:2]))
        torch.testing.assert_close(whole[:2], alone)
        again, apart = (made.online.through(some, 1) for some in (whole, alone))
    assert not torch.allclose(again[:2], apart, atol=1e-2)


def test_running_statistics_follow_both_views_of_the_online_branch_alone(conv):
    """One step against torch's own rule: 0.9 old + 0.1 of the batch, view after view."""
    config = conv()
    tensors, drawn = grown(config, 2), batch(config)
    made = prepare(config, tensors, config.plan(2).trained)
    seen = []
    norms = {name: module for name, module in made.online.named_modules() if isinstance(module, torch.nn.BatchNorm2d) and module.training}
    assert {part_of(f"{name}.") for name in norms} == {"layer.2"}
    name, norm = next(iter(norms.items()))
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    train_step(made, drawn, 1e-3, config)
    assert len(seen) == 2
    mean, variance = tensors[f"{name}.running_mean"], tensors[f"{name}.running_var"]
    for maps in seen:
        mean = 0.9 * mean + 0.1 * maps.mean(dim=(0, 2, 3))
        variance = 0.9 * variance + 0.1 * maps.var(dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


def test_branches_share_what_is_frozen_and_keep_statistics_of_their_own(conv):
    config = conv("alignment.method=moon")
    terms, plan = Terms(config.alignment), config.plan(2)
    previous = {name: tensor + 0.01 for name, tensor in grown(config, 2).items() if part_of(name) in plan.trained}
    kept = digest(previous)
    made = prepare(config, grown(config, 2), plan.trained, terms, previous)
    online = made.online.state_dict()
    for branch in (made.target.network, made.received):
        for name, tensor in branch.state_dict().items():
            alone = part_of(name) in plan.trained and part_of(name) != "predictor"
            assert (tensor.data_ptr() != online[name].data_ptr()) == alone, name
        for (_, mine), (_, theirs) in zip(branch.named_modules(), made.online.named_modules(), strict=True):
            assert mine.training == theirs.training
    before = {name: tensor.clone() for name, tensor in made.target.network.state_dict().items() if is_statistic(name)}
    for _ in range(2):
        train_step(made, batch(config), 1e-3, config, terms)
    after = made.target.network.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (part_of(name) in plan.frozen), name
    assert digest(previous) == kept, "what the caller gave stays as it is"


def test_calibration_trains_statistics_of_all_layers(conv, photos):
    config = conv("calibration={every: stage, data: digits, batch_size: 4}")
    plan, tensors = config.plan(2), grown(config, 2)
    trained, _ = train_local(config, calibration_task(config, plan, 0, config.place(2, 1)), tensors, photos)
    moved = {part_of(name) for name in trained if is_statistic(name) and not torch.equal(trained[name], tensors[name])}
    assert moved == {"stem", "layer.1", "layer.2"}


def test_mixed_precision(conv):
    config = conv("train.precision=bf16", "ssl.temperature=0.2")
    exact = conv("ssl.temperature=0.2")
    made, plain = (prepare(one, grown(one, 2), one.plan(2).trained) for one in (config, exact))
    assert train_step(made, batch(config), 1e-3, config) == pytest.approx(train_step(plain, batch(exact), 1e-3, exact), rel=0.05)
    assert {tensor.dtype for tensor in made.online.state_dict().values()} == {torch.float32}


def test_tensors_are_float32_and_loading_draws_nothing(conv):
    config = conv("stages.strategy=end_to_end")
    tensors = init_parts(config, config.plan(1).present)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes(config, config.plan(1).present)
    before = torch.get_rng_state()
    for loaded in (load_encoder(config.model, tensors), load_network(config, tensors)):
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
        assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(torch.get_rng_state(), before)
    del tensors["bn1.running_mean"]
    with pytest.raises(RuntimeError, match=r"bn1\.running_mean"):
        load_network(config, tensors)
    with pytest.raises(RuntimeError, match=r"bn1\.surplus"):
        load_network(config, {**init_parts(config, config.plan(1).present), "bn1.surplus": torch.zeros(1)})


def test_parts_are_whole_and_disjoint(conv):
    config = conv()
    names = [name for layers in range(1, config.model.depth + 1) for name in part_shapes(config, f"layer.{layers}")]
    assert len(set(names)) == len(names)
    whole = build_encoder(config.model, config.model.depth).state_dict()
    assert whole.keys() == {*names, *part_shapes(config, "stem")}


def test_naming_a_backbone_brings_its_size(tiny):
    for name, traits in CONVOLUTIONAL.items():
        model = tiny(f"model.backbone={name}").model
        assert (model.depth, model.width) == (traits.depth, traits.width)
        with pytest.raises(ConfigError, match=rf"{name} has depth {traits.depth} and width {traits.width}, not 3 and {traits.width}"):
            tiny(f"model.backbone={name}", "model.depth=3")
    with pytest.raises(ConfigError, match="must be one of vit, resnet18, mobilenetv3_small_100"):
        tiny("model.backbone=resnet81")
    with pytest.raises(ConfigError, match="must be text"):
        tiny("model.backbone=[vit]")


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("ssl.method=mae", "mae hides patches"),
        ("train.micro_batch=4", "statistics of the whole batch"),
        ("stages.layer_init=copy", "layers of one shape"),
        ("stages.depth_dropout=0.1", "layers of one shape"),
    ],
)
def test_what_a_convolutional_backbone_cannot_do(conv, setting, says):
    with pytest.raises(ConfigError, match=says):
        conv(setting)


def test_without_timm_it_says_what_to_install(tiny, monkeypatch):
    convolutional._without_weights.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependency, match=r"resnet18 needs timm: pip install 'lwfed\[backbones\]'"):
        build_encoder(tiny("model.backbone=resnet18").model, 1)


def test_too_many_layers(conv):
    model = conv().model
    with pytest.raises(ValueError, match="cannot have"):
        build_encoder(model, model.depth + 1)


def test_patches_cannot_be_hidden(conv):
    encoder = build_encoder(conv().model, 1)
    with pytest.raises(ValueError, match="no patches"):
        encoder.stem(torch.zeros(2, 3, 32, 32), torch.zeros(2, 1, dtype=torch.long))


def test_traits_are_those_of_the_module(conv):
    model = conv().model
    encoder = build_encoder(model, model.depth).eval()
    x, found = encoder.stem(torch.zeros(2, 3, 32, 32)), []
    for layer in encoder.layers():
        x = layer(x)
        found.append(x.shape[1])
    traits = CONVOLUTIONAL[model.backbone]
    assert tuple(found) == traits.widths
    assert traits.adapted == tuple(range(1, traits.depth))


def test_replacing_images_by_tensors_changes_no_bit(conv, photos):
    config, plan = conv(), conv().plan(1)
    task = replace(device_task(config, plan, 0, config.place(1, 1)), batch_size=8)
    first, again = (train_local(config, task, grown(config, 1), some)[0] for some in (photos, torch.from_numpy(photos)))
    assert digest(first) == digest(again)
