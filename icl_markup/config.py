"""Configurations: YAML files into typed dataclasses, with overrides from the command line.

A field's docstring is its help. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from docstring_parser import parse_from_object
from pydantic import TypeAdapter, ValidationError

from icl_markup.errors import ConfigError, nearest

T = TypeVar("T")

# PyYAML's constructors let their own errors through on malformed scalars ("2024-13-45", "!!bool x", deep nesting).
_YAML_ERRORS = (yaml.YAMLError, ValueError, AttributeError, LookupError, RecursionError, TypeError)


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Read a configuration.

    Args:
        cls: the dataclass to build.
        path: a YAML file, or None for the defaults.
        overrides: ``--key value`` or ``--key=value`` pairs; dots lead into nested fields and lists
            (``--warmup.steps 100``, ``--tasks.0.path data.csv``); values are read as YAML.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown, or a value is of the wrong type; the
            message names the file and the key.
    """
    where = str(path) if path is not None else "command line"
    tree = _read_yaml(Path(path)) if path is not None else {}
    for key, value in _pairs(overrides):
        _set(tree, key, value)
    _check_keys(cls, tree, where, "")
    try:
        return TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {key or 'configuration'}: {first['msg']} (got {first['input']!r})") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain, JSON-able data."""
    return typing.cast(dict[str, Any], TypeAdapter(type(config)).dump_python(config, mode="json"))


def require_positive(config: Any, *names: str) -> None:
    """Check fields of a configuration when it is made.

    Raises:
        ConfigError: one of them is not above zero.
    """
    for name in names:
        if getattr(config, name) <= 0:
            raise ConfigError(f"{name}: {getattr(config, name)} is not above zero")


def describe(cls: type[Any]) -> str:
    """Return the help of a configuration: every key with its type, default and docstring."""
    lines = []
    for key, kind, default, text in _fields(cls, ""):
        lines.append(f"  --{key} {kind}" + (f"  (default: {default})" if default is not None else ""))
        lines.append(f"      {text}")
    return "\n".join(lines)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except _YAML_ERRORS as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(tree).__name__}")
    return tree


def _pairs(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    rest = list(overrides)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"command line: expected --key, found {word!r}")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"command line: --{key} lacks a value")
            value = rest.pop(0)
        try:
            yield key, yaml.safe_load(value)
        except _YAML_ERRORS as error:
            raise ConfigError(f"command line: --{key}: {value!r} is not valid YAML") from error


def _set(tree: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        child = _child(tree, part, key)
        if child is None:
            child = {}
            tree[int(part) if isinstance(tree, list) else part] = child
        tree = child
    if isinstance(tree, list):
        _child(tree, last, key)
        tree[int(last)] = value
    elif isinstance(tree, dict):
        tree[last] = value
    else:
        raise ConfigError(f"command line: --{key}: {last!r} has nothing to be set in")


def _child(tree: Any, part: str, key: str) -> Any:
    if isinstance(tree, dict):
        return tree.get(part)
    if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
        return tree[int(part)]
    raise ConfigError(f"command line: --{key}: no element {part!r} there")


def _check_keys(kind: Any, value: Any, where: str, prefix: str) -> None:
    """Walk the data beside the types; report the first key that no dataclass has."""
    dataclass, element = _parts_of(kind)
    if dataclass is not None and isinstance(value, dict):
        hints = typing.get_type_hints(dataclass)
        known = [f.name for f in dataclasses.fields(dataclass)]
        for key in list(value):
            # Hyphens are as good as underscores in a field's name (but not in a task's).
            if key not in known and str(key).replace("-", "_") in known:
                value[str(key).replace("-", "_")] = value.pop(key)
        for key, child in value.items():
            if key not in known:
                raise ConfigError(f"{where}: unknown key {prefix}{key}{nearest(str(key), known)}")
            _check_keys(hints[key], child, where, f"{prefix}{key}.")
    elif isinstance(value, bool) and _wants_number(kind):
        raise ConfigError(f"{where}: {prefix.rstrip('.')}: a number is wanted (got {value})")
    elif element is not None and isinstance(value, list):
        for index, child in enumerate(value):
            _check_keys(element, child, where, f"{prefix}{index}.")


def _wants_number(kind: Any) -> bool:
    """Whether a type holds a number and no truth value; YAML reads ``yes`` as one, and Python that as 1."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    return bool({int, float} & set(parts)) and bool not in parts


def _parts_of(kind: Any) -> tuple[Any, Any]:
    """Return the dataclass in a type, and the element type of a list in it, where there are any."""
    if dataclasses.is_dataclass(kind):
        return kind, None
    origin = typing.get_origin(kind)
    if origin in (list, tuple, Sequence):
        return None, typing.get_args(kind)[0]
    if origin in (typing.Union, types.UnionType):
        parts = [_parts_of(part) for part in typing.get_args(kind)]
        return next((d for d, _ in parts if d), None), next((e for _, e in parts if e), None)
    return None, None


def _fields(cls: type[Any], prefix: str) -> Iterator[tuple[str, str, str | None, str]]:
    docs = {p.arg_name: " ".join((p.description or "").split()) for p in parse_from_object(cls).params}
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            yield from _fields(typing.cast(type[Any], kind), f"{prefix}{item.name}.")
            continue
        default: str | None = None
        if item.default is not dataclasses.MISSING:
            default = str(item.default)
        elif item.default_factory is not dataclasses.MISSING:
            default = str(item.default_factory())
        yield prefix + item.name, _type_name(kind), default, docs.get(item.name, "")


def _type_name(kind: Any) -> str:
    if isinstance(kind, type) and not typing.get_args(kind):
        return kind.__name__
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type_name(a) for a in typing.get_args(kind))
    origin = typing.get_origin(kind)
    return (
        f"{origin.__name__}[{', '.join(_type_name(a) for a in typing.get_args(kind) if a is not ...)}]"
        if origin
        else str(kind)
    )
