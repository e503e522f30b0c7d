"""Where a configuration comes from: `base.yaml`, then a preset or a user's file, then ``--set key=value``; later wins."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lwfed.backbones import CONVOLUTIONAL
from lwfed.config.explain import explain
from lwfed.config.parse import base, merge, packaged, parse
from lwfed.config.schema import RunConfig
from lwfed.errors import ConfigError


def presets() -> list[str]:
    """Names that `load_config` knows without a path."""
    return sorted(entry.name.removesuffix(".yaml") for entry in resources.files("lwfed.configs").iterdir() if entry.name.endswith(".yaml"))


def load_config(name: str, settings: Sequence[str] = ()) -> RunConfig:
    """The configuration of preset or file `name` with ``key=value`` settings on top.

    Raises ConfigError that lists every problem at once, each with the nearest key that exists.
    """
    merged = base()
    for over in (*([parse(_read(name), name)] if name != "base" else []), *map(_setting, settings)):
        merged = merge(_sized(merged, over), over)
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error, name, RunConfig)) from None


def _read(name: str) -> str:
    known = presets()
    if name in known:
        return packaged(name)
    path = Path(name)
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean the preset {near[0]!r}?" if near else f"presets: {', '.join(known)}; or give the path of a YAML file"
        raise ConfigError(f"configuration {name!r} cannot be read ({getattr(error, 'strerror', None) or error}); {hint}") from None


def _setting(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r}: write it as section.key=value, e.g. --set train.lr=3e-3")
    first, *rest = key.strip().split(".")
    nested: Any = parse(f"value: {value}", f"--set {text}")["value"]
    for part in reversed(rest):
        nested = {part: nested}
    return {first: nested}


def _sized(merged: Mapping[str, Any], over: Mapping[str, Any]) -> Mapping[str, Any]:
    """With depth and width of the backbone that `over` names, where they are given with it."""
    model = over.get("model")
    name = model.get("backbone") if isinstance(model, Mapping) else None
    traits = CONVOLUTIONAL.get(name) if isinstance(name, str) else None
    return merge(merged, {"model": {"depth": traits.depth, "width": traits.width}}) if traits else merged
