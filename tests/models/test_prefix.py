import importlib.util
import sys

import numpy as np
import pytest
import torch

from lwfed.config import load_config
from lwfed.models import prefix as module
from lwfed.models.backbones import load_encoder
from lwfed.models.graphs import make_graphs
from lwfed.models.initial import init_parts
from lwfed.models.prefix import TOLERANCE, OnnxPrefix, TorchPrefix, make_prefix, quantise, relative_errors, runtime_version, weights

from .conftest import TINY

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")),
    reason="ONNX Runtime is not installed: pip install 'lwfed[onnx]'",
)


@pytest.fixture(params=["mean", "token"])
def encoder(request, tiny):
    """With weights of ordinary size everywhere, so that no term hides behind zeros and ones."""
    config = tiny(f"model.pooling={request.param}")
    generator = torch.Generator().manual_seed(0)
    tensors = init_parts(config, config.plan(3).present)
    return load_encoder(
        config.model, {name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in tensors.items()}
    ), config


ANY_POOLING = pytest.mark.parametrize("encoder", ["mean"], indirect=True)  # where it is of no concern


@pytest.fixture(autouse=True)
def quick_trials(monkeypatch):
    """Each engine is timed twice and no longer."""
    monkeypatch.setattr(module, "TRIAL_S", 0.0)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    return make_graphs(load_config("base", TINY).model, ["onnx", "onnx_int8"], tmp_path_factory.mktemp("graphs"))


def tokens(encoder, batch=5, seed=1):
    return encoder.stem(torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))


@needs_onnx
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("layers", [1, 3])
def test_float32_equals_torch_at_any_batch(encoder, graphs, batch, layers):
    model, _ = encoder
    made = OnnxPrefix(model, layers, "onnx", graphs["onnx"])
    x = tokens(model, batch)
    assert relative_errors(made(x, ()), TorchPrefix(model, layers)(x, ())).max() < 1e-6
    assert relative_errors(made(x, {0}), TorchPrefix(model, layers)(x, {0})).max() < 1e-6


@ANY_POOLING
@needs_onnx
def test_the_version_is_known_before_it_is_imported(encoder, graphs):
    assert OnnxPrefix(encoder[0], 1, "onnx", graphs["onnx"]).runtime == runtime_version()


@needs_onnx
def test_int8_is_near(encoder, graphs):
    model, _ = encoder
    made = OnnxPrefix(model, 3, "onnx_int8", graphs["onnx_int8"])
    errors = relative_errors(made(tokens(model), ()), TorchPrefix(model, 3)(tokens(model), ()))
    assert 1e-6 < errors.min() <= errors.max() < TOLERANCE["onnx_int8"]


@needs_onnx
def test_current_weights_go_in(encoder, graphs):
    model, _ = encoder
    before = OnnxPrefix(model, 1, "onnx", graphs["onnx"])(tokens(model), ())
    with torch.no_grad():
        model.blocks[0].mlp.fc2.weight.mul_(2)
    after = OnnxPrefix(model, 1, "onnx", graphs["onnx"])(tokens(model), ())
    assert not torch.allclose(before, after)
    assert relative_errors(after, TorchPrefix(model, 1)(tokens(model), ())).max() < 1e-6


def test_quantised_weights_are_within_half_a_step():
    weight = np.random.default_rng(0).normal(size=(6, 10)).astype(np.float32)
    weight[2] = 0
    values, scale = quantise(weight)
    assert values.dtype == np.int8
    assert np.abs(values).max() == 127
    assert np.all(np.abs(values.T * scale[:, None] - weight) <= scale[:, None] / 2 + 1e-7)


@ANY_POOLING
@needs_onnx
def test_quantisation_is_that_of_onnxruntime(encoder):
    """Against the tool's per-channel symmetric int8, which imports onnx."""
    from onnxruntime.quantization.quant_utils import quantize_data

    matrix = encoder[0].blocks[0].attn.qkv.weight.detach().numpy()
    values, scale = quantise(matrix)
    for row in range(len(matrix)):
        result = quantize_data(matrix[row], 3, True)  # TensorProto.INT8
        wanted = result[-1] if isinstance(result, tuple) else result
        assert np.abs(values[:, row].astype(int) - np.asarray(wanted, dtype=int).reshape(-1)).max() <= 1
        assert scale[row] > 0


@ANY_POOLING
@needs_onnx
def test_auto_takes_the_fastest_that_is_near_enough(encoder, graphs, monkeypatch):
    model, _ = encoder
    speeds = {"torch": 3.0, "onnx": 2.0, "onnx_int8": 1.0}
    monkeypatch.setattr(module, "_time", lambda prefix, _: speeds[prefix.engine])
    chosen = make_prefix(model, 3, "auto", graphs, tokens(model), 5)
    assert chosen.prefix.engine == "onnx_int8"
    monkeypatch.setattr(module, "TOLERANCE", {"onnx": 1e-4, "onnx_int8": 1e-9})
    chosen = make_prefix(model, 3, "auto", graphs, tokens(model), 5)
    assert chosen.prefix.engine == "onnx"
    assert "onnx_int8: off by" in chosen.reason
    speeds["torch"] = 0.1
    assert make_prefix(model, 3, "auto", graphs, tokens(model), 5).prefix.engine == "torch"
    assert make_prefix(model, 3, "auto", graphs, tokens(model), 5, torch_fits=False).prefix.engine == "onnx"
    assert make_prefix(model, 3, "onnx_int8", graphs, tokens(model), 5).prefix.engine == "torch"


@ANY_POOLING
@needs_onnx
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
@pytest.mark.parametrize("wrong", [1.06, float("nan")])
def test_each_image_is_judged_by_itself_at_any_micro_batch(encoder, graphs, monkeypatch, micro_batch, wrong):
    """One of eight that is off by 6 % makes 2 % of all."""
    model, _ = encoder
    given, exact = tokens(model, 8), OnnxPrefix.__call__
    monkeypatch.setattr(OnnxPrefix, "__call__", lambda self, x, skip: exact(self, x, skip) * torch.where(x == given[6:7], wrong, 1.0))
    chosen = make_prefix(model, 3, "onnx_int8", graphs, given, micro_batch)
    assert chosen.prefix.engine == "torch"
    assert "of torch's tokens of an image, more than 5.00%" in chosen.reason
    monkeypatch.setattr(OnnxPrefix, "__call__", exact)
    assert make_prefix(model, 3, "onnx_int8", graphs, given, micro_batch).prefix.engine == "onnx_int8"


@ANY_POOLING
def test_without_onnx_runtime_torch_does_it_and_says_why(encoder, tmp_path, monkeypatch):
    model, _ = encoder
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    sent = {engine: tmp_path / engine for engine in ("onnx", "onnx_int8")}
    for file in sent.values():
        file.write_bytes(b"graph")
    for wanted in ("auto", "onnx"):
        chosen = make_prefix(model, 3, wanted, sent, tokens(model), 5)
        assert chosen.prefix.engine == "torch"
        assert "pip install 'lwfed[onnx]'" in chosen.reason


@ANY_POOLING
def test_a_broken_installation_is_not_the_fault_of_the_graph(encoder, tmp_path, monkeypatch):
    model, _ = encoder
    (tmp_path / "onnxruntime.py").write_text("raise RuntimeError('libonnx is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    chosen = make_prefix(model, 3, "onnx", {"onnx": tmp_path / "0123"}, tokens(model), 5)
    assert chosen.prefix.engine == "torch"
    assert chosen.reason.startswith("onnx: ONNX Runtime fails as it is installed (RuntimeError: libonnx is broken): pip install --upgrade")


@ANY_POOLING
@needs_onnx
@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 576. KiB for an array"),
        RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : while running MatMul node. Name:'' Status Message: std::bad_alloc"),
        RuntimeError("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1024"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 768 bytes"),
    ],
    ids=["python", "onnxruntime", "arena", "torch"],
)
@pytest.mark.parametrize("wanted", ["onnx", "auto"])
def test_lack_of_memory_leads_to_torch_and_is_named(encoder, graphs, monkeypatch, wanted, error):
    model, _ = encoder

    def fail(*given):
        raise error

    monkeypatch.setattr(OnnxPrefix, "__call__", fail)
    chosen = make_prefix(model, 3, wanted, graphs, tokens(model), 5)
    assert chosen.prefix.engine == "torch"
    assert f"onnx: too little memory ({type(error).__name__}: {error})" in chosen.reason
    assert "pip install" not in chosen.reason


BROKEN = [lambda content: b"", lambda content: content[: len(content) // 2], lambda content: bytes(len(content))]


@ANY_POOLING
@needs_onnx
@pytest.mark.parametrize("wanted", ["onnx", "auto"])
@pytest.mark.parametrize("spoil", BROKEN, ids=["empty", "cut", "zeros"])
def test_a_graph_that_does_not_work_is_a_reason_that_names_it(encoder, graphs, tmp_path, wanted, spoil):
    model, _ = encoder
    broken = {"onnx": tmp_path / "0123"}
    broken["onnx"].write_bytes(spoil(graphs["onnx"].read_bytes()))
    chosen = make_prefix(model, 3, wanted, broken, tokens(model), 5)
    assert chosen.prefix.engine == "torch"
    assert "onnx: its graph 0123 does not work (" in chosen.reason
    assert "pip install --upgrade 'lwfed[onnx]'" in chosen.reason


def of_an_unknown_version(model):
    """Refused when a session is made, as by an ONNX Runtime from before the graph's operators."""
    model.opset_import[0].version = 1000


def out_of_range(model):
    """Loads, and fails when it runs, as what this machine has no kernel for may: attention has no part 10."""
    next(one for one in model.graph.initializer if one.name == "at.v").int64_data[0] = 10


@ANY_POOLING
@needs_onnx
@pytest.mark.parametrize("wanted", ["onnx", "auto"])
@pytest.mark.parametrize(("fail", "said"), [(of_an_unknown_version, "opset"), (out_of_range, "while running Gather")])
def test_a_graph_that_is_accepted_and_fails_in_onnx_runtime_leads_to_torch(encoder, graphs, monkeypatch, wanted, fail, said):
    import onnx

    (model, _), session = encoder, module._session

    def failing(onnxruntime, content, given):
        damaged = onnx.load_from_string(content)
        fail(damaged)
        return session(onnxruntime, damaged.SerializeToString(), given)

    monkeypatch.setattr(module, "_session", failing)
    chosen = make_prefix(model, 3, wanted, {"onnx": graphs["onnx"]}, tokens(model), 5)
    assert chosen.prefix.engine == "torch"
    assert f"onnx: its graph {graphs['onnx'].name} does not work (" in chosen.reason
    assert said in chosen.reason
    assert "pip install --upgrade 'lwfed[onnx]'" in chosen.reason


@ANY_POOLING
@needs_onnx
def test_a_graph_of_another_layer_is_refused(encoder, tiny, tmp_path):
    model, _ = encoder
    other = make_graphs(tiny("model.width=24").model, ["onnx"], tmp_path)
    chosen = make_prefix(model, 3, "onnx", other, tokens(model), 5)
    assert chosen.prefix.engine == "torch"
    assert "does not work" in chosen.reason


@ANY_POOLING
def test_without_a_graph_torch_does_it_and_says_why(encoder, tmp_path):
    model, _ = encoder
    for wanted, sent in (("auto", {}), ("onnx", {}), ("onnx", {"onnx_int8": tmp_path / "graph"})):
        chosen = make_prefix(model, 3, wanted, sent, tokens(model), 5)
        assert (chosen.prefix.engine, chosen.reason) == ("torch", "there is no graph for ONNX Runtime")


def test_weights_have_every_tensor_of_the_layer(encoder):
    block = encoder[0].blocks[0].state_dict()
    assert set(weights(block, False)) == set(block)
    assert set(weights(block, True)) - set(block) == {f"{name}.weight.scale" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
