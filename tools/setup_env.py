"""Make `.venv` and install this checkout in it: ``python3 -I tools/setup_env.py demo``. The Makefile calls it; it needs nothing but Python.

torch is what makes this more than one line. A build that is already here (NVIDIA's on a Jetson, one of a GPU machine) is kept, and
constrained to its version, whatever constraints.txt says of torch. Otherwise pip is asked beforehand which torch it would fetch,
because one with CUDA is several GB that a machine without a GPU has no use for.

A stamp is written when all is done, so a set-up that was interrupted is taken up again by the next call.
PIP_OPTIONS in the environment is given to every ``pip install``: an index, a folder of wheels.
"""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = "constraints.txt"  # also of the merged one in .venv
STAMP = ".installed-"  # the Makefile's targets
RESOLVING_PIP = (23, 3)  # the first whose --dry-run leaves the wheels, GBs of them, where they are
FORECAST_S = 120  # a slow index; the installation itself has all the time it needs
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # pytorch.org, "Get Started"
ALONE = {"test": "reference"}  # extras whose packages come with another one, without what they require
PIN = re.compile(r"^(?P<name>[\w.-]+)\s*==\s*(?P<version>[^\s;#]+)\s*(?:;\s*(?P<marker>[^#]*?))?\s*(?:#.*)?$")
CUDA = re.compile(r"^(nvidia|cuda|triton)(-|$)")
PROBE = """
import importlib.metadata as metadata, importlib.util as util, json
first = {name: next(iter(metadata.distributions(name=name)), None) for name in ("pip", "torch")}
print(json.dumps({name: found.version for name, found in first.items() if found and util.find_spec(name)}))
"""
VISION = "import importlib.util as util; util.find_spec('torchvision') and __import__('torchvision')"


class SetupError(Exception):
    """What could not be done, and what to do about it."""


@dataclass(frozen=True)
class Forecast:
    """The torch that pip would install, and the packages of CUDA that would come with it."""

    version: str
    cuda: tuple[str, ...]


def forecast(report: Mapping[str, Any]) -> Forecast | None:
    """Out of ``pip install --report``; None when torch is not to be installed."""
    versions = {item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"] for item in report["install"]}
    if "torch" not in versions:
        return None
    return Forecast(versions["torch"], tuple(sorted(name for name in versions if CUDA.match(name))))


def warning(coming: Forecast) -> str | None:
    """What to know before pip starts; None when the build is for the CPU."""
    if not coming.cuda and "+cu" not in coming.version:
        return None
    brings = f" and brings {len(coming.cuda)} more packages ({coming.cuda[0]}, ...)" if coming.cuda else ""
    return (
        f"torch {coming.version} is a build for CUDA{brings}: several GB. It works without a GPU too. For one without CUDA,\n"
        "stop this with Ctrl-C and name an index that has one, for example PyTorch's own:\n"
        f'    make setup PIP_OPTIONS="--extra-index-url {CPU_INDEX}"'
    )


def keep_torch(constraints: str, version: str) -> str:
    """The constraints with torch held at `version`.

    Pins of torch and torchvision with one marker belong together; where that torch is another one, both give way.
    """
    lines = [(line, PIN.match(line)) for line in constraints.splitlines()]
    right = (version, version.split("+")[0])
    other = {pin["marker"] for _, pin in lines if pin and pin["name"] == "torch" and pin["version"] not in right}
    kept = [line for line, pin in lines if not (pin and pin["name"] in ("torch", "torchvision") and pin["marker"] in other)]
    return "\n".join([*kept, f"torch=={version}"]) + "\n"


def closure(extra: str, extras: Mapping[str, Sequence[str]], package: str) -> set[str]:
    """`extra` and all that it contains by ``package[...]``; raises SetupError when there is no such extra."""
    if extra not in extras:
        raise SetupError(f"no extra is called {extra!r}; there are {', '.join(extras)}")
    named = re.findall(rf"^{re.escape(package)}\[([^]]+)\]", "\n".join(extras[extra]), re.MULTILINE)
    inner = [name.strip() for names in named for name in names.split(",")]
    return {extra}.union(*(closure(name, extras, package) for name in inner))


def needs_new_pip(version: str) -> bool:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < RESOLVING_PIP


def read_extras(root: Path) -> tuple[str, dict[str, list[str]]]:
    """Name of the package and its extras, from setup.cfg."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(root / "setup.cfg", encoding="utf-8")
    return parser["metadata"]["name"], {name: text.split("\n") for name, text in parser["options.extras_require"].items()}


def set_up(extra: str, venv: Path, options: Sequence[str]) -> None:
    """Everything; raises SetupError."""
    package, extras = read_extras(ROOT)
    contained = closure(extra, extras, package)
    python = _make_venv(venv)
    if needs_new_pip(_probe(python)["pip"]):
        _pip(python, ["--quiet", "--upgrade", f"pip>={RESOLVING_PIP[0]}.{RESOLVING_PIP[1]}", *options])
    constraints = _constraints(python, venv, options)
    _say(f"Installing {package}[{extra}] in {venv}")
    _pip(python, ["--editable", f"{ROOT}[{extra}]", "--constraint", str(constraints), *options])
    alone = [requirement for name in sorted(contained & ALONE.keys()) for requirement in extras[ALONE[name]] if requirement]
    if alone:
        _pip(python, ["--no-deps", *alone, "--constraint", str(constraints), *options])
    for name in sorted(contained):
        (venv / f"{STAMP}{name}").touch()
    text = misfit(python)
    if text:
        _say(text)


def misfit(python: Path) -> str | None:
    """What to know of a torchvision that cannot be imported as it is installed; None where it can, or is not there."""
    answer = subprocess.run([str(python), "-c", VISION], capture_output=True, text=True, cwd="/")
    if answer.returncode == 0:
        return None
    reason = (answer.stderr.strip().splitlines() or ["no message"])[-1]
    return (
        f"The torchvision that is installed does not fit torch ({reason}).\n"
        "lwfed does not need it, timm does: for that one, install torch and torchvision from the same index"
    )


def _make_venv(venv: Path) -> Path:
    """The Python of `venv`, which is made when it is not there or not whole."""
    python = venv / "bin" / "python"
    found = _probe(python)
    if "pip" in found:
        return python
    flags = [] if found else ["--clear"]  # one whose Python does not run is of no use to anybody
    theirs = _probe(Path(sys.executable)).get("torch")
    if theirs:
        flags.append("--system-site-packages")
    _say(f"Making {venv} with {sys.executable}" + (f", sharing its torch {theirs}" if theirs else ""))
    if subprocess.run([sys.executable, "-m", "venv", *flags, str(venv)]).returncode:
        raise SetupError(f"{sys.executable} could not make {venv}; Debian and its relatives need: apt install python3-venv")
    found = _probe(python)
    if "pip" not in found:
        raise SetupError(f"{venv} has no pip that works; delete it and try again")
    if theirs and "torch" not in found:
        _say(f"torch {theirs} belongs to a virtual environment, which cannot be shared: {venv} gets its own")
    return python


def _constraints(python: Path, venv: Path, options: Sequence[str]) -> Path:
    """The file to install with, after a word about the torch that is here or will come."""
    tested = ROOT / CONSTRAINTS
    torch = _probe(python).get("torch")
    if torch is None:
        _foretell(python, tested, options)
        return tested
    _say(f"Keeping torch {torch}")
    merged = venv / CONSTRAINTS
    merged.write_text(keep_torch(tested.read_text(encoding="utf-8"), torch), encoding="utf-8")
    return merged


def _foretell(python: Path, constraints: Path, options: Sequence[str]) -> None:
    command = ["--dry-run", "--quiet", "--report", "-", "--constraint", str(constraints), "torch", *options]
    try:
        answer = subprocess.run([str(python), "-m", "pip", "install", *command], capture_output=True, text=True, timeout=FORECAST_S)
    except subprocess.TimeoutExpired:
        return
    coming = forecast(json.loads(answer.stdout)) if answer.returncode == 0 else None  # what failed here fails again, aloud
    text = warning(coming) if coming else None
    if text:
        _say(text)


def _probe(python: Path) -> dict[str, str]:
    """Versions of pip and torch as `python` sees them; empty when it does not run."""
    try:
        answer = subprocess.run([str(python), "-c", PROBE], capture_output=True, text=True, cwd="/")
    except OSError:
        return {}
    return dict(json.loads(answer.stdout)) if answer.returncode == 0 else {}


def _pip(python: Path, arguments: Sequence[str]) -> None:
    if subprocess.run([str(python), "-m", "pip", "install", *arguments]).returncode:
        raise SetupError(
            "pip failed, and says above why. The same command goes on from here; PIP_OPTIONS names another index.\n"
            "A torch that was already here is never replaced: if it stands in the way, remove it, or name another PYTHON and delete .venv"
        )


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main() -> int:
    """The exit code: 0, 1 for what failed, 2 for a wrong call, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(description="Make .venv and install this checkout in it.")
    parser.add_argument("extra", help="of setup.cfg: demo, test, ...")
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    arguments = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 - whoever calls it may have an older one
        parser.error(f"{sys.executable} is older than Python 3.10; name a newer one: make PYTHON=python3.12 ...")
    try:
        set_up(arguments.extra, arguments.venv.absolute(), shlex.split(os.environ.get("PIP_OPTIONS", "")))
    except (SetupError, OSError, ValueError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
