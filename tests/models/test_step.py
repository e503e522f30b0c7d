import copy
import math
from dataclasses import replace

import pytest
import torch

from lwfed.models.heads import load_network, predict, project
from lwfed.models.initial import init_parts
from lwfed.models.ssl import METHODS, alignment
from lwfed.models.ssl.moco_v3 import info_nce
from lwfed.models.step import METHOD_ALONE, Means, Terms, _Run, backward, draw_batch, prefix_layers, prepare, train_step
from lwfed.plan import part_of

PARTS = {"stem", "layer.1", "layer.2", "norm", "projector", "predictor"}


STRATEGIES = [("layer_wise", 1), ("layer_wise", 3), ("progressive", 2), ("end_to_end", 1)]


def batch(config, count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return draw_batch(config, seed, 0, torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator), 1)


def views(drawn):
    return [drawn.view(number, slice(None)) for number in range(len(drawn.views))]


def prepared(config, stage, terms=METHOD_ALONE, previous=None, dtype=torch.float32):
    plan = config.plan(stage)
    tensors = {name: tensor.to(dtype) for name, tensor in init_parts(config, plan.present).items()}
    micro_batch = config.train.micro_batch
    means = Means(micro_batch=micro_batch if isinstance(micro_batch, int) else None)
    return prepare(config, tensors, plan.trained, terms, previous, means), tensors, plan


def gradients(config, stage, terms=METHOD_ALONE, dtype=torch.float64):
    """Loss and gradients of one batch; the previous model, where one is compared with, has other weights."""
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})})
    previous = {name: tensor.to(dtype) for name, tensor in init_parts(other, config.plan(stage).trained).items()}
    made, _, _ = prepared(config, stage, terms, previous, dtype)
    loss = backward(made, batch(config, 7), config, terms)
    return loss, {name: tensor.grad for name, tensor in made.online.named_parameters() if tensor.requires_grad}


@pytest.mark.parametrize(("strategy", "stage"), STRATEGIES)
def test_two_steps_against_whole_modules(tiny, strategy, stage):
    """The same two steps with two whole networks, torch's AdamW and an EMA by hand: no prefix, nothing shared."""
    config = tiny(f"stages.strategy={strategy}", "train.weight_decay=0.0", "ssl.momentum=0.5")
    made, _, _ = prepared(config, stage)
    online = copy.deepcopy(made.online)
    target = copy.deepcopy(made.online).requires_grad_(False)
    trained = [tensor for tensor in online.parameters() if tensor.requires_grad]
    reference = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, foreach=True)
    for number in range(2):
        drawn = batch(config, seed=number)
        q1, q2 = (predict(online, project(online, online.features(view))) for view in views(drawn))
        k1, k2 = (project(target, target.features(view)) for view in views(drawn))
        loss = info_nce(q1, k2, 0.05) + info_nce(q2, k1, 0.05)
        reference.zero_grad()
        loss.backward()
        reference.step()
        with torch.no_grad():
            for old, new in zip(target.parameters(), online.parameters(), strict=True):
                old.copy_(0.5 * old + 0.5 * new)
        assert train_step(made, drawn, 1e-3, config) == pytest.approx(loss.item(), rel=1e-5)
    for (name, mine), theirs in zip(made.online.named_parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3, msg=name)


def held_for_backward(monkeypatch, config, images):
    """The most bytes that graphs through the layers hold at a time, in one `backward` of a batch."""
    held, most = 0, 0

    class Held:
        def __init__(self, tensor):
            nonlocal held, most
            self.tensor, held = tensor, held + tensor.nbytes
            most = max(most, held)

        def __del__(self):
            nonlocal held
            held -= self.tensor.nbytes

    represent = _Run._represent

    def watched(*given):
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda one: one.tensor):
            return represent(*given)

    monkeypatch.setattr(_Run, "_represent", watched)
    made, _, _ = prepared(config, 3)
    backward(made, batch(config, images), config)
    monkeypatch.undo()
    assert held == 0
    return most


@pytest.mark.parametrize("strategy", ["layer_wise", "progressive"])
@pytest.mark.parametrize("method", METHODS)
def test_a_larger_batch_holds_no_more_of_the_layers_for_the_backward_pass(tiny, monkeypatch, method, strategy):
    config = tiny(f"stages.strategy={strategy}", f"ssl.method={method}", "train.micro_batch=4")
    small, large = (held_for_backward(monkeypatch, config, images) for images in (8, 64))
    assert 0 < small == large


@pytest.mark.parametrize(("aligned", "micro_batch"), [("cosine", 1), ("cosine", 3), ("cosine", 7), ("moon", 3)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("strategy", "stage"), STRATEGIES)
def test_gradients_do_not_depend_on_the_micro_batch(tiny, strategy, stage, method, aligned, micro_batch):
    settings = [
        f"stages.strategy={strategy}",
        f"ssl.method={method}",
        "stages.depth_dropout=0.5",
        "ssl.temperature=0.2",
        "ssl.decoder_width=32",
    ]
    terms = Terms(tiny(f"alignment.method={aligned}").alignment)
    loss, whole = gradients(tiny(*settings), stage, terms)
    config = tiny(*settings, f"train.micro_batch={micro_batch}")
    again, pieces = gradients(config, stage, terms)
    assert again == pytest.approx(loss, rel=1e-12)
    scale = max(float(tensor.abs().max()) for tensor in whole.values())
    assert all(float((pieces[name] - whole[name]).abs().max()) <= 1e-10 * scale for name in whole)
    single, rounded = gradients(config, stage, terms, dtype=torch.float32)
    assert single == pytest.approx(loss, rel=1e-4)
    assert all(float((rounded[name] - whole[name]).abs().max()) <= 1e-4 * scale for name in whole)


@pytest.mark.parametrize("method", METHODS)
def test_every_trained_tensor_gets_a_gradient_and_no_frozen_one(tiny, method):
    for pooling in ("mean", "token"):
        config = tiny(f"ssl.method={method}", f"model.pooling={pooling}", "ssl.decoder_width=32")
        made, _, plan = prepared(config, 2)
        assert math.isfinite(backward(made, batch(config), config))
        for name, tensor in made.online.named_parameters():
            assert (tensor.grad is not None) == (part_of(name) in plan.trained), name


def test_alignment_adds_its_term(tiny):
    """With one step behind it, so that online, received and previous model differ."""
    config = tiny()
    previous = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in init_parts(config, config.plan(2).trained).items()}
    for method, weight in (("cosine", 0.5), ("moon", 2.0)):
        section = tiny(f"alignment={{method: {method}, alpha: {weight}, temperature: 0.3}}").alignment
        terms = Terms(section)
        made, tensors, _ = prepared(config, 2, terms, previous)
        train_step(made, batch(config), 1e-2, config, terms)
        plain = copy.deepcopy(replace(made, received=None))
        view = views(batch(config))[0]
        with torch.no_grad():
            z = [
                project(one, one.features(view))
                for one in (made.online, load_network(config, tensors), load_network(config, {**tensors, **previous}))
            ]
        term = alignment.cosine(z[0], z[1]) if method == "cosine" else alignment.moon(*z, 0.3)
        both, alone = backward(made, batch(config), config, terms), backward(plain, batch(config), config)
        assert both - alone == pytest.approx(weight * term.item(), rel=1e-4)
        assert term.item() > 1e-3


def test_received_and_previous_model_stay_as_they_are(tiny):
    config = tiny()
    previous = init_parts(tiny("run.seed=1"), config.plan(2).trained)
    terms = Terms(tiny("alignment.method=moon").alignment)
    made, tensors, _ = prepared(config, 2, terms, previous)
    for number in range(2):
        train_step(made, batch(config, seed=number), 1e-2, config, terms)
    for name, tensor in made.received.state_dict().items():
        if part_of(name) != "predictor":  # that of the online branch, which nothing reads
            assert torch.equal(tensor, tensors[name]), name
    assert all(torch.equal(made.previous.state_dict()[name], tensor) for name, tensor in previous.items())


def test_every_step_and_every_call_has_views_of_its_own(tiny):
    config, images = tiny(), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    drawn = [draw_batch(config, seed, step, images, 0).views for seed, step in ((1, 0), (1, 1), (2, 0), (1, 0))]
    amounts = [tuple(view.amounts.flatten().tolist()) for views in drawn for view in views]
    assert len(set(amounts)) == 6
    assert amounts[:2] == amounts[-2:]


def test_proximal_term_is_that_of_fedprox(tiny):
    """Against the gradient of mu / 2 |w - w_received|^2 by autograd, in the second step, when w has moved."""
    config, terms = tiny("train.weight_decay=0.0"), Terms(proximal=0.3)
    made, tensors, _ = prepared(config, 2, terms)
    plain = copy.deepcopy(made)
    for one, which in ((made, terms), (plain, terms)):
        train_step(one, batch(config), 1e-2, config, which)
    backward(plain, batch(config, seed=1), config)
    penalty = sum((tensor - tensors[name]).square().sum() for name, tensor in plain.online.named_parameters() if tensor.requires_grad)
    (0.15 * penalty).backward()
    plain.optimiser.step(1e-2)
    train_step(made, batch(config, seed=1), 1e-2, config, terms)
    for (name, mine), theirs in zip(made.online.named_parameters(), plain.online.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3, msg=name)


def test_frozen_parts_are_shared_and_stay_as_they_are(tiny):
    made, tensors, _ = prepared(tiny(), 2)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    train_step(made, batch(tiny()), 1e-2, tiny())
    named = dict(made.online.named_parameters())
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        assert named[name].data_ptr() == tensors[name].data_ptr()
        assert named[name].grad is None
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)  # trained ones were copied
    assert not torch.equal(named["blocks.1.mlp.fc1.weight"], before["blocks.1.mlp.fc1.weight"])
    assert made.prefix_layers == 1


@pytest.mark.parametrize(("micro_batch", "pieces"), [("null", 1), (2, 3)])
def test_prefix_runs_once_per_view(tiny, micro_batch, pieces):
    config = tiny(f"train.micro_batch={micro_batch}", "alignment.method=cosine")
    terms = Terms(config.alignment)
    made, _, _ = prepared(config, 3, terms)
    calls = []
    made.online.blocks[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    train_step(made, batch(config), 1e-3, config, terms)
    assert calls == [False] * 2 * pieces


@pytest.mark.parametrize("micro_batch", ["null", 2])
def test_mixed_precision_covers_prefix_and_layers_but_not_heads_and_ends_with_the_step(tiny, micro_batch):
    config = tiny("train.precision=bf16", f"train.micro_batch={micro_batch}", "alignment.method=cosine")
    terms = Terms(config.alignment)
    made, _, _ = prepared(config, 2, terms)
    seen = {}
    modules = {"prefix": made.online.blocks[0].mlp, "layer": made.online.blocks[1].mlp, "head": made.online.projector[0]}
    modules |= {"target": made.target.network.blocks[1].mlp, "received": made.received.blocks[1].mlp}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, set()).add(out.dtype))
    train_step(made, batch(config), 1e-3, config, terms)
    assert seen == {"head": {torch.float32}} | {name: {torch.bfloat16} for name in ("prefix", "layer", "target", "received")}
    assert not torch.is_autocast_enabled("cpu")
    assert {tensor.dtype for tensor in made.trained} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_is_near_full_precision(tiny, method):
    settings = [f"ssl.method={method}", "ssl.temperature=0.2", "ssl.decoder_width=32"]
    loss, exact = gradients(tiny(*settings), 2, dtype=torch.float32)
    rough, found = gradients(tiny(*settings, "train.precision=bf16"), 2, dtype=torch.float32)
    assert rough == pytest.approx(loss, rel=0.05)
    flat = [torch.cat([tensor.flatten() for tensor in one.values()]) for one in (exact, found)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.98


def test_depth_dropout_skips_frozen_layers_at_its_rate(tiny):
    config = tiny("stages.depth_dropout=0.25")
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    skips = [draw_batch(config, 0, step, images, 10).skip for step in range(400)]
    assert sum(map(len, skips)) / 4000 == pytest.approx(0.25, abs=0.03)
    made, _, _ = prepared(config, 3)
    calls = []
    for block in made.online.blocks[:2]:
        block.register_forward_hook(lambda module, *_: calls.append(module))
    train_step(made, replace(batch(config), skip=frozenset({0})), 1e-3, config)
    assert set(calls) == {made.online.blocks[1]}


def test_a_loss_that_is_not_finite_changes_nothing(tiny):
    made, tensors, _ = prepared(tiny(), 1)
    drawn = batch(tiny())
    drawn.views[1].amounts[:] = float("nan")
    assert math.isnan(train_step(made, drawn, 1e-3, tiny()))
    assert all(torch.equal(dict(made.online.named_parameters())[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("trained", "layers"),
    [
        (PARTS, None),
        (PARTS - {"stem"}, 0),
        (PARTS - {"stem", "layer.1"}, 1),
        ({"norm", "projector", "predictor"}, 2),
    ],
)
def test_prefix_layers(trained, layers):
    assert prefix_layers(PARTS, trained) == layers


@pytest.mark.parametrize("trained", [set(), {"layer.1"}, PARTS - {"norm"}, PARTS - {"layer.1"}, {*PARTS, "layer.3"}])
def test_only_the_end_of_the_model_can_be_trained(trained):
    with pytest.raises(ValueError, match="cannot be trained"):
        prefix_layers(PARTS, trained)
