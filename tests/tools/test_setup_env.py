import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lwfed.tools import setup_env
from lwfed.tools.setup_env import Forecast, SetupError, closure, forecast, keep_torch, misfit, needs_new_pip, read_extras, warning

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = """\
# tested
torch==2.13.0; platform_machine == "x86_64"
torchvision==0.28.0; platform_machine == "x86_64"
torch==2.9.1; platform_machine == "aarch64"
torchvision==0.24.1; platform_machine == "aarch64"  # a Pi
numpy==2.4.6
"""
EXTRAS = {"train": ["torch>=2.6"], "server": ["torch>=2.6"], "demo": ["our[server]", "figures"], "test": ["our[demo, train]", "pytest>=8"]}


def report(*packages: str) -> dict[str, Any]:
    """As `pip install --report` writes it, as far as it is read."""
    pairs = [package.split("==") for package in packages]
    return {"version": "1", "install": [{"metadata": {"name": name, "version": version}} for name, version in pairs]}


def test_torch_for_cuda_is_foreseen_with_what_it_brings() -> None:
    coming = forecast(report("torch==2.13.0", "nvidia_cublas==13.1", "cuda-toolkit==13.0", "triton==3.7", "numpy==2.4.6", "cudapath==1"))
    assert coming == Forecast("2.13.0", ("cuda-toolkit", "nvidia-cublas", "triton"))


def test_torch_for_the_cpu_is_foreseen_without_a_warning() -> None:
    coming = forecast(report("torch==2.13.0+cpu", "numpy==2.4.6"))
    assert coming == Forecast("2.13.0+cpu", ())
    assert warning(coming) is None


def test_nothing_is_foreseen_where_torch_is_not_to_be_installed() -> None:
    assert forecast(report("numpy==2.4.6", "nvidia-ml-py==13")) is None


@pytest.mark.parametrize("coming", [Forecast("2.13.0", ("nvidia-cublas", "triton")), Forecast("2.9.1+cu126", ())])
def test_the_warning_says_what_comes_and_how_to_choose_otherwise(coming: Forecast) -> None:
    text = warning(coming)
    assert text is not None
    assert coming.version in text
    assert 'PIP_OPTIONS="--extra-index-url https://' in text
    assert all(name in text for name in coming.cuda[:1])


def test_a_kept_torch_displaces_the_pins_that_contradict_it() -> None:
    lines = keep_torch(CONSTRAINTS, "2.8.0+cu126").splitlines()
    assert lines == ["# tested", "numpy==2.4.6", "torch==2.8.0+cu126"]


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cpu"])
def test_the_tested_torch_keeps_its_torchvision(version: str) -> None:
    lines = keep_torch(CONSTRAINTS, version).splitlines()
    assert lines == [*CONSTRAINTS.splitlines()[:3], "numpy==2.4.6", f"torch=={version}"]


def test_pins_without_a_marker_give_way_too() -> None:
    assert keep_torch("torch==2.13.0\ntorchvision == 0.28.0\ntorchmetrics==1.0", "2.9.1") == "torchmetrics==1.0\ntorch==2.9.1\n"


def test_the_constraints_of_this_project_can_hold_any_torch() -> None:
    merged = keep_torch((ROOT / "constraints.txt").read_text(encoding="utf-8"), "2.5.0a0+872d972e41.nv24.8")
    assert [line for line in merged.splitlines() if line.startswith("torch")] == ["torch==2.5.0a0+872d972e41.nv24.8"]


def test_an_extra_counts_as_installed_with_the_one_that_contains_it() -> None:
    assert closure("test", EXTRAS, "our") == {"test", "demo", "server", "train"}
    assert closure("demo", EXTRAS, "our") == {"demo", "server"}


def test_an_unknown_extra_is_named_with_those_there_are() -> None:
    with pytest.raises(SetupError, match=r"'dmeo'.*train, server, demo, test"):
        closure("dmeo", EXTRAS, "our")


@pytest.mark.parametrize(("version", "old"), [("22.0.2", True), ("23.2.1", True), ("23.3", False), ("24.0", False), ("26.1.dev0", False)])
def test_a_pip_that_would_download_to_resolve_is_replaced(version: str, old: bool) -> None:
    assert needs_new_pip(version) is old


def test_the_extras_that_the_makefile_installs_are_in_setup_cfg() -> None:
    package, extras = read_extras(ROOT)
    assert package == "lwfed"
    assert {"demo", "test"} <= set(extras)
    assert "demo" in closure("test", extras, package)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "(RuntimeError: operator torchvision::nms does not exist)"),
        ("", None),
    ],
)
def test_a_torchvision_that_does_not_fit_is_told_with_whom_it_concerns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, says: str | None
) -> None:
    (tmp_path / "torchvision.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    text = misfit(Path(sys.executable))
    if says is None:
        assert text is None
    else:
        assert text is not None
        assert says in text
        assert "lwfed does not need it, timm does" in text


def test_a_torchvision_that_is_not_there_is_not_missed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    assert misfit(tmp_path / "venv" / "bin" / "python") is None


@pytest.mark.parametrize(("extra", "alone"), [("test", ["lightly>=1.5"]), ("demo", [])])
def test_references_of_tests_come_without_what_they_require(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str, alone: list[str]
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(setup_env, "_make_venv", lambda venv: venv / "bin" / "python")
    monkeypatch.setattr(setup_env, "_probe", lambda python: {"pip": "26.0", "torch": "2.13.0"})
    monkeypatch.setattr(setup_env, "_pip", lambda python, arguments: calls.append(list(arguments)))
    monkeypatch.setattr(setup_env, "misfit", lambda python: None)
    setup_env.set_up(extra, tmp_path, ["--no-index"])
    assert calls[0][:2] == ["--editable", f"{ROOT}[{extra}]"]
    pinned = ["--constraint", str(tmp_path / "constraints.txt"), "--no-index"]
    assert calls[1:] == ([["--no-deps", *alone, *pinned]] if alone else [])


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(ROOT / "tools" / "setup_env.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_a_wrong_extra_ends_with_a_message_before_anything_is_made(tmp_path: Path) -> None:
    answer = run_script("dmeo", "--venv", str(tmp_path / "venv"))
    assert answer.returncode == 1
    assert answer.stderr.startswith("error: no extra is called 'dmeo'")
    assert not (tmp_path / "venv").exists()


def test_unbalanced_quotes_in_pip_options_end_with_a_message(tmp_path: Path) -> None:
    answer = run_script("demo", "--venv", str(tmp_path / "venv"), PIP_OPTIONS='--find-links "/wheels')
    assert answer.returncode == 1
    assert answer.stderr == "error: No closing quotation\n"


def test_a_folder_that_cannot_be_made_ends_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    answer = run_script("demo", "--venv", str(tmp_path / "file" / "venv"))
    assert answer.returncode == 1
    assert "could not make" in answer.stderr.splitlines()[-1]
    assert "Traceback" not in answer.stderr


def test_it_needs_nothing_that_is_installed() -> None:
    """It runs where there is only Python: isolated, without site-packages."""
    answer = subprocess.run([sys.executable, "-I", "-S", str(ROOT / "tools" / "setup_env.py"), "--help"], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
