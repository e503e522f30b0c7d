"""Configurations as YAML has them: sections of keys, which nothing has validated yet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from lwfed.errors import ConfigError


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
def parse(text: str, name: str) -> Mapping[str, Any]:
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


def packaged(name: str) -> str:
    """The text of `base.yaml` or a preset."""
    return resources.files("lwfed.configs").joinpath(f"{name}.yaml").read_text("utf-8")


def base() -> Mapping[str, Any]:
    """What `base.yaml` states: every key."""
    return parse(packaged("base"), "base.yaml")


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


# PyYAML follows YAML 1.1, in which 1e-3 is a string; YAML 1.2 and people read a number.
_StrictLoader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
