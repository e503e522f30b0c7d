"""The one maker of graphs; that they compute what torch does is tested where they are run."""

import importlib.util
import subprocess
import sys

import pytest

from lwfed.errors import MissingDependency
from lwfed.models import graphs as module
from lwfed.models.graphs import make_graphs
from lwfed.wire.messages import MAX_GRAPH_BYTES

needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="the package onnx is not installed")


@needs_onnx
def test_every_maker_makes_the_same_bytes(tiny, tmp_path):
    """So that two servers, or a device that measures, mean the same graph by the same digest."""
    model, made = tiny().model, []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        files = make_graphs(model, ["onnx", "onnx_int8"], folder)
        made.append({engine: file.read_bytes() for engine, file in files.items()})
    assert made[0] == made[1]
    assert made[0]["onnx"] != made[0]["onnx_int8"]


@needs_onnx
def test_the_graph_of_a_huge_layer_may_travel(tiny, tmp_path):
    model = tiny("model.width=4096", "model.heads=64", "model.mlp_ratio=16").model
    assert all(file.stat().st_size < MAX_GRAPH_BYTES / 4 for file in make_graphs(model, ["onnx", "onnx_int8"], tmp_path).values())


def test_nothing_is_started_where_no_graph_is_wanted(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    assert make_graphs(tiny().model, [], tmp_path) == {}


def test_without_the_package_onnx_what_to_install_is_said(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match=r"need the package onnx: pip install 'onnx>=1\.17'"):
        make_graphs(tiny().model, ["onnx"], tmp_path)


@needs_onnx
@pytest.mark.parametrize(
    ("command", "limit_s", "reason"),
    [
        ("import sys; sys.exit('it is broken')", 60.0, "it is broken"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 60.0, "SIGKILL"),
        ("import time; time.sleep(60)", 0.1, "not within 0.1 s"),
    ],
    ids=["fails", "killed", "hangs"],
)
def test_a_package_onnx_that_does_not_work_is_a_reason(tiny, tmp_path, monkeypatch, command, limit_s, reason):
    run = subprocess.run
    monkeypatch.setattr(module.subprocess, "run", lambda _, **how: run([sys.executable, "-c", command], **how))
    monkeypatch.setattr(module, "MADE_WITHIN_S", limit_s)
    with pytest.raises(MissingDependency, match=f"cannot be made .*{reason}.*pip install --upgrade"):
        make_graphs(tiny().model, ["onnx"], tmp_path)
