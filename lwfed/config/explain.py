"""What is wrong with a configuration, in words: every problem at once, each with the nearest key that exists."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from lwfed.console import counted

WORDS = {  # by the type of pydantic's error, whose own words are for programmers
    "model_type": "must be a section of keys, not a value",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a smaller number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "string_pattern_mismatch": "must be 1 to 64 of a-z, 0-9 and -",  # Identifier, the only one
    "literal_error": "must be {expected}",
    "tuple_type": "must be a list",
    "too_long": "must have at most {max_length} values",
    "greater_than": "must be more than {gt:.10g}",
    "greater_than_equal": "must be at least {ge:.10g}",
    "less_than": "must be less than {lt:.10g}",
    "less_than_equal": "must be at most {le:.10g}",
}


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
    found: dict[str, list[Mapping[str, Any]]] = {}
    for problem in error.errors():
        found.setdefault(_path(problem["loc"], known), []).append(problem)
    lines = [_line(path, problems, known) for path, problems in found.items()]
    return f"{name}: {counted(len(lines), 'problem')}\n" + "\n".join(f"  {line}" for line in lines)


def unknown(error: ValidationError) -> list[str]:
    """Dotted keys that the configuration does not have."""
    return [".".join(map(str, problem["loc"])) for problem in error.errors() if problem["type"] == "extra_forbidden"]


def _path(loc: Sequence[int | str], known: Collection[str]) -> str:
    """The key; without what pydantic adds to it for each kind of value that the key may have, which is a word and no index."""
    whole, key = ".".join(map(str, loc)), ""
    for count, part in enumerate(loc):
        key = f"{key}.{part}" if key else str(part)
        if key in known and isinstance((*loc, 0)[count + 1], str):
            return key
    return whole


def _line(path: str, problems: Sequence[Mapping[str, Any]], known: Collection[str]) -> str:
    """What is wrong with one key: several problems where it may have values of several kinds and is of none."""
    problem = problems[0]
    if problem["type"] == "extra_forbidden":
        return f"{path}: no such key{_nearest(path, list(known))}"
    if problem["type"] == "missing":
        return f"{path}: missing"
    first, *others = dict.fromkeys(map(_message, problems))
    message = ", or ".join([first, *(other.removeprefix("must be ") for other in others)])
    value = problem["input"]
    shown = "" if isinstance(value, Mapping | BaseModel) else f" (got {value!r})"
    return f"{path}: {message}{shown}" if path else message


def _message(problem: Mapping[str, Any]) -> str:
    words = WORDS.get(problem["type"])
    return words.format(**problem.get("ctx", {})) if words else str(problem["msg"]).removeprefix("Value error, ")


def _nearest(path: str, known: list[str]) -> str:
    """What the key may have been meant to be: the same word in another section, a like word, or the list of its section."""
    section, _, word = path.rpartition(".")
    words = {key.rpartition(".")[2]: key for key in reversed(known)}  # the first section that has a word wins
    siblings = [key for key in known if section and key.startswith(f"{section}.")]
    sections = sorted({key.split(".")[0] for key in known})
    near = (
        [words[word]]
        if word in words
        else [f"{section}.{like}" for like in difflib.get_close_matches(word, [key.rpartition(".")[2] for key in siblings], 1)]
        or ([] if siblings else difflib.get_close_matches(path.split(".")[0], sections, 1))
        or [words[like] for like in difflib.get_close_matches(word, list(words), 1, cutoff=0.8)]
    )
    if near:
        return f"; did you mean {near[0]}?"
    return f"; {section} has {', '.join(key.rpartition('.')[2] for key in siblings)}" if siblings else f"; sections: {', '.join(sections)}"
