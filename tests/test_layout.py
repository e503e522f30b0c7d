"""The borders of the packages, and that what is installed is what stands in the folders."""

from __future__ import annotations

import ast
import configparser
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

ARROWS = {
    "lwfed": set(),
    "configs": set(),
    "models": {"lwfed"},
    "edge_agent": {"models", "lwfed"},
    "cloud_server": {"models", "lwfed"},
    "tools": {"edge_agent", "cloud_server", "models", "lwfed", "configs"},
}

TORCH = {"torch", "torchvision", "timm"}
TRAIN = {  # processes of their own
    *(f"lwfed.edge_agent.{name}" for name in ("means", "trainer", "worker", "profiling.sample")),
    "lwfed.cloud_server.torch_jobs",
}
TORCHVISION_SETS = "lwfed.data.torchvision_sets"

COORDINATING = ("coordinator", "duty", "events", "notices", "plateau", "rounds", "sampling")
PURE = {"lwfed.plan", *(f"lwfed.cloud_server.{name}" for name in COORDINATING)}  # and lwfed.wire
OUTSIDE = {
    *("asyncio", "datetime", "glob", "io", "multiprocessing", "os", "paho", "pathlib", "queue", "random", "secrets", "select", "selectors"),
    *("shutil", "signal", "socket", "sqlite3", "ssl", "subprocess", "tempfile", "threading", "time", "urllib", "uuid"),
}
EXCUSED = {
    ("lwfed.wire.tensors", "pathlib.Path"),  # an update is checked tensor by tensor from the file in which it lies
    ("lwfed.wire.sizes", "pathlib.Path"),  # reads the header of a part from the file in which it lies
    ("lwfed.wire.inbox", "pathlib.Path"),  # hands on where the blob store has put a verified update
    ("lwfed.wire.retry", "random.Random"),  # jitter, from a generator that is an argument
    ("lwfed.wire.download", "random.Random"),  # makes that generator from the seed that is its argument
    ("lwfed.wire.upload", "random.Random"),  # likewise
}

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
MACHINES = ("x86_64", "aarch64")


@dataclass(frozen=True)
class Import:
    """`name` as imported: ``import a.b`` and ``from a import b`` are both ``a.b``."""

    name: str
    in_function: bool
    for_types: bool

    @property
    def top(self) -> str:
        return self.name.split(".")[0]


@cache
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


@cache
def folders() -> dict[str, Path]:
    """The installed name of each top-level folder."""
    pairs = [line.split(" = ") for line in lines(setup()["options"]["package_dir"])]
    return {name: ROOT / folder for name, folder in pairs}


@cache
def modules() -> dict[str, Path]:
    """All modules and packages by their installed names."""
    found = {}
    for name, folder in folders().items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([name, *parts]).removesuffix(".__init__")] = path
    return found


def owner(module: str) -> str:
    """The folder that a module stands in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and f"lwfed.{parts[1]}" in folders() else "lwfed"


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> tuple[Import, ...]:
    return tuple(_imports(tree(module), module, False, False))


def _imports(node: ast.AST, module: str, in_function: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, in_function, for_types) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}:{child.lineno}: imports are absolute"
            yield from (Import(f"{child.module}.{alias.name}", in_function, for_types) for alias in child.names)
        else:
            inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            types = isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
            yield from _imports(child, module, in_function or inner, for_types or types)


def module_of(name: str) -> str | None:
    """The module of ours that the import of `name` loads; None when it is not ours."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


@cache
def loaded_with(module: str) -> frozenset[str]:
    """Everything that importing `module` imports, by first name if it is not ours."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for imported in imports(current) if current in modules() else ():
            if not imported.in_function and not imported.for_types:
                ours = module_of(imported.name)
                waiting += [ours, *_parents(ours)] if ours else [imported.top]
    return frozenset(seen)


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def test_packages_import_along_the_arrows_only() -> None:
    crossing = [
        f"{module} -> {imported.name}"
        for module in modules()
        for imported in imports(module)
        if (ours := module_of(imported.name)) and owner(ours) not in {owner(module), *ARROWS[owner(module)]}
    ]
    assert crossing == []


def test_every_folder_has_its_arrows() -> None:
    assert {owner(name) for name in folders()} == set(ARROWS)


def test_the_contract_of_agent_and_server_knows_no_torch() -> None:
    found = {
        (module, imported.in_function)
        for module in modules()
        if owner(module) == "lwfed"
        for imported in imports(module)
        if imported.top in TORCH
    }
    assert found == {(TORCHVISION_SETS, True)}


@pytest.mark.parametrize("package", ["edge_agent", "cloud_server"])
def test_torch_is_imported_by_training_processes_only(package: str) -> None:
    ours = {module for module in modules() if owner(module) == package}
    direct = {module for module in ours if any(imported.top in TORCH and not imported.for_types for imported in imports(module))}
    indirect = {module for module in ours if loaded_with(module) & TORCH}
    assert direct | indirect == TRAIN & ours


def test_control_processes_do_not_load_torch() -> None:
    program = "import sys, lwfed.edge_agent.agent, lwfed.cloud_server.server, lwfed.cloud_server.serve; "
    program += f"print(sorted({TORCH} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stdout == "[]\n", answer.stderr


def pure_modules() -> list[str]:
    return sorted(PURE | {module for module in modules() if module.startswith("lwfed.wire")})


def test_the_pure_middle_has_no_clock_socket_file_or_global_random() -> None:
    found = {(module, imported.name) for module in pure_modules() for imported in imports(module) if imported.top in OUTSIDE}
    assert found == EXCUSED


@pytest.mark.parametrize("module", pure_modules())
def test_generators_of_the_pure_middle_have_seeds(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print", "input"), f"line {node.lineno}"
            assert node.func.id not in ("Random", "Philox") or node.args or node.keywords, f"line {node.lineno}: without a seed"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("np", "random"), f"line {node.lineno}"


def test_setup_cfg_lists_the_packages_that_there_are() -> None:
    packages = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in modules().items()}
    assert sorted(lines(setup()["options"]["packages"])) == sorted(packages)
    assert [package for package in packages if modules().get(package, Path()).name != "__init__.py"] == []


def test_no_code_stands_outside_the_packages() -> None:
    with_code = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") and any(path.glob("*.py"))}
    assert with_code - {"tests", "build"} == {folder.name for folder in folders().values()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: a build leaves files in its folder that the next one would pack."""
    copy = tmp_path_factory.mktemp("source")
    for folder in folders().values():
        shutil.copytree(folder, copy / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(copy / "out")]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(copy)], check=True)
    (path,) = (copy / "out").iterdir()
    return zipfile.ZipFile(path)


def test_the_wheel_installs_one_name(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lwfed"}
    assert len(top) == 2


def test_the_wheel_holds_all_that_stands_in_the_folders(wheel: zipfile.ZipFile) -> None:
    standing = {
        str(Path(*name.split("."), path.relative_to(folder)))
        for name, folder in folders().items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == standing
    assert "lwfed/configs/base.yaml" in standing


def test_the_programs_of_the_wheel_exist() -> None:
    for line in lines(setup()["options.entry_points"]["console_scripts"]):
        module, function = line.split(" = ")[1].split(":")
        assert function in {node.name for node in tree(module).body if isinstance(node, ast.FunctionDef)}


def requirements() -> dict[str, list[Requirement]]:
    """Of the base installation, as "", and of each extra."""
    extras = {name: lines(text) for name, text in setup()["options.extras_require"].items()}
    return {
        name: [Requirement(line) for line in texts] for name, texts in {"": lines(setup()["options"]["install_requires"]), **extras}.items()
    }


def constraints(python: str, machine: str) -> dict[str, list[str]]:
    """The versions that constraints.txt pins on such a machine, by package."""
    here = {"python_version": python, "python_full_version": f"{python}.1", "platform_machine": machine}
    pins: dict[str, list[str]] = {}
    for line in lines((ROOT / "constraints.txt").read_text(encoding="utf-8")):
        if not line.startswith("#"):
            pin = Requirement(line)
            (specifier,) = pin.specifier
            assert specifier.operator == "==", line
            if pin.marker is None or pin.marker.evaluate(here):
                pins.setdefault(canonicalize_name(pin.name), []).append(specifier.version)
    return pins


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("python", PYTHONS)
def test_every_extra_admits_the_one_version_it_is_tested_with(python: str, machine: str) -> None:
    pins = constraints(python, machine)
    for extra, needed in requirements().items():
        if (extra, machine) == ("pi", "x86_64"):  # below the torch that is tested there
            continue
        for requirement in needed:
            if requirement.name == "lwfed":
                assert requirement.extras <= set(requirements())
                continue
            (version,) = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"[{extra}] {requirement}: {version}"


def test_constraints_name_only_what_is_required() -> None:
    required = {canonicalize_name(requirement.name) for needed in requirements().values() for requirement in needed}
    pinned = {name for machine in MACHINES for python in PYTHONS for name in constraints(python, machine)}
    assert pinned == required - {"lwfed"}


def test_only_training_brings_torch() -> None:
    assert TORCH & {requirement.name for requirement in requirements()[""]} == set()
