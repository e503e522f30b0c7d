"""What is wrong with a configuration, in words: every problem at once, each with the nearest key that exists."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of the configuration, e.g. ``train.lr``."""
    found: list[str] = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += keys(field.annotation, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def explain(error: ValidationError, name: str, model: type[BaseModel]) -> str:
    """All problems of configuration `name`, a line each."""
    known = keys(model)
    lines = [_line(problem, known) for problem in error.errors()]
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    return f"{name}: {count}\n" + "\n".join(f"  {line}" for line in lines)


def _line(problem: Mapping[str, Any], known: Iterable[str]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{path}: no such key{_nearest(path, list(known))}"
    if problem["type"] == "missing":
        return f"{path}: missing"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem["input"]
    shown = "" if isinstance(value, Mapping | BaseModel) else f" (got {value!r})"
    return f"{path}: {message}{shown}" if path else message


def _nearest(path: str, known: list[str]) -> str:
    """The key most like `path`: the same last word in another section counts more than a like spelling."""
    same_word = [key for key in known if key.rpartition(".")[2] == path.rpartition(".")[2]]
    near = same_word[:1] or difflib.get_close_matches(path, known, 1, cutoff=0.5)
    if not near:
        sections = sorted({key.split(".")[0] for key in known})
        near = difflib.get_close_matches(path.split(".")[0], sections, 1)
    return f"; did you mean {near[0]}?" if near else "; configs/base.yaml lists all keys"
