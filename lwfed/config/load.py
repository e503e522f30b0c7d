"""Where a configuration comes from: `base.yaml`, then a preset or a user's file, then ``--set key=value``; later wins."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lwfed.backbones import CONVOLUTIONAL
from lwfed.config.explain import explain
from lwfed.config.schema import RunConfig
from lwfed.errors import ConfigError


def presets() -> list[str]:
    """Names that `load_config` knows without a path."""
    return sorted(entry.name.removesuffix(".yaml") for entry in resources.files("lwfed.configs").iterdir() if entry.name.endswith(".yaml"))


def load_config(name: str, settings: Sequence[str] = ()) -> RunConfig:
    """The configuration of preset or file `name` with ``key=value`` settings on top.

    Raises ConfigError that lists every problem at once, each with the nearest key that exists.
    """
    merged = _parse(resources.files("lwfed.configs").joinpath("base.yaml").read_text("utf-8"), "base.yaml")
    for over in (*([_parse(_read(name), name)] if name != "base" else []), *map(_setting, settings)):
        merged = _merge(_sized(merged, over), over)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error, name, RunConfig)) from None


def _read(name: str) -> str:
    known = presets()
    if name in known:
        return resources.files("lwfed.configs").joinpath(f"{name}.yaml").read_text("utf-8")
    path = Path(name)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean the preset {near[0]!r}?" if near else f"presets: {', '.join(known)}; or give the path of a YAML file"
        raise ConfigError(f"configuration {name!r} cannot be read ({getattr(error, 'strerror', None) or error}); {hint}") from None


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, where PyYAML silently keeps the last one, and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


@lru_cache(maxsize=256)
def _parse(text: str, name: str) -> Mapping[str, Any]:
    """Read once, for it takes ten milliseconds: not to be changed."""
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # noqa: S506, a subclass of SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that does not exist, a number like 0b_
        raise ConfigError(f"{name} is no valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{name} must be sections of keys, as in base.yaml, not a {type(data).__name__}")
    return data


def _setting(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: write it as section.key=value, e.g. --set train.lr=3e-3")
    first, *rest = key.strip().split(".")
    nested: Any = _parse(f"value: {value}", f"--set {text}")["value"]
    for part in reversed(rest):
        nested = {part: nested}
    return {first: nested}


def _sized(merged: Mapping[str, Any], over: Mapping[str, Any]) -> Mapping[str, Any]:
    """With depth and width of the backbone that `over` names, where they are given with it."""
    model = over.get("model")
    name = model.get("backbone") if isinstance(model, Mapping) else None
    traits = CONVOLUTIONAL.get(name) if isinstance(name, str) else None
    return _merge(merged, {"model": {"depth": traits.depth, "width": traits.width}}) if traits else merged


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


# PyYAML follows YAML 1.1, in which 1e-3 is a string; YAML 1.2 and people read a number.
_StrictLoader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
