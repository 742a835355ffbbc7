"""YAML or JSON mappings -> frozen dataclasses, checked field by field (pydantic does the checking).

One `@config` class per stage; each field carries a docstring with its unit.  A recipe file names choices, a
command line flag names a place, and a dotted override `train.samples=1000` changes one choice for one run.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, dataclass_transform, get_args, get_type_hints

import yaml

from pipeline.errors import ConfigError, check_name
from pipeline.storage import read_bytes

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Return `cls` as a frozen, keyword-only dataclass that rejects unknown fields and values of another type."""
    cls.__pydantic_config__ = {"extra": "forbid", "strict": False}  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)


def read_config(cls: type[T], values: Mapping[str, Any] | None, *, where: str) -> T:
    """Return `values` as a `cls`; `where` is the dotted place named in messages.

    Raises ConfigError that names each bad field, its value and, for an unknown field, the nearest known one.
    """
    from pydantic import TypeAdapter, ValidationError

    values = values or {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a mapping of fields, got {values!r}.")
    for name in values:
        check_name(str(name), [f.name for f in dataclasses.fields(cls)], kind=f"field of {where}")  # type: ignore[arg-type]
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(cls, e, where) for e in error.errors())) from None


def _explain(cls: type, error: Any, where: str) -> str:
    """Return one line for one pydantic error: dotted place, what is wrong, the value, and the nearest field name."""
    *parents, last = error["loc"] or ("",)
    place = ".".join([where, *map(str, error["loc"])])
    if error["type"] != "unexpected_keyword_argument":
        return f"{place}: {error['msg']} (got {error['input']!r}{_hint(error)})"
    try:
        check_name(str(last), _find_fields(cls, parents), kind=f"field of {'.'.join([where, *map(str, parents)])}")
    except ConfigError as unknown:
        return str(unknown)
    return f"{place}: {error['msg']}"


def _hint(error: Any) -> str:
    """Return what to write instead of one value for a list, or of a whole number that YAML reads as text (1e6)."""
    if error["type"] in ("tuple_type", "list_type"):
        return f"; write [{error['input']}]"
    try:
        number = float(error["input"]) if error["type"] == "int_parsing" else math.nan
    except ValueError:
        return ""
    return f"; write {int(number)}" if number.is_integer() else ""


def _find_fields(cls: Any, path: Sequence[Any]) -> list[str]:
    """Return the field names of the config class that a path of fields, keys and positions leads to."""
    for name in path:
        cls = get_type_hints(cls).get(name) if dataclasses.is_dataclass(cls) else _find_inner(cls)
        if type(None) in get_args(cls):  # X | None
            cls = _find_inner(cls)
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _find_inner(cls: Any) -> Any:
    """Return X of dict[str, X], list[X] or X | None."""
    return next((a for a in reversed(get_args(cls)) if dataclasses.is_dataclass(a) or get_args(a)), None)


def as_mapping(value: Any) -> Any:
    """Return a config dataclass as plain dicts, lists and scalars, ready for JSON; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_mapping(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): as_mapping(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_mapping(v) for v in value]
    return value


def read_yaml(url: str) -> dict[str, Any]:
    """Return the mapping in a YAML file.  Raises ConfigError if it is not valid YAML or not a mapping."""
    try:
        values = yaml.safe_load(read_bytes(url))
    except yaml.YAMLError as error:
        raise ConfigError(f"{url} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{url} should hold a mapping of fields, not {type(values).__name__}.")
    return values


def override(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return `values` with each `a.b.c=VALUE` applied (VALUE is read as YAML); the input is left alone.

    A whole number in the path is a position in a list.  Raises ConfigError for an assignment that has no place.
    """
    result = copy.deepcopy(values)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"override {assignment!r} should look like train.samples=1000.")
        *parents, last = path.split(".")
        place: Any = result
        for name in parents:
            place = _step_into(place, name, assignment)
        key: Any = int(last) if isinstance(place, list) and last.isdigit() else last
        try:
            place[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {assignment!r}: {text!r} is not a YAML value.") from None
        except (IndexError, TypeError):
            raise ConfigError(f"override {assignment!r}: there is no {last!r} to set.") from None
    return result


def _step_into(place: Any, name: str, assignment: str) -> Any:
    if isinstance(place, dict):
        return place.setdefault(name, {})
    if isinstance(place, list) and name.isdigit() and int(name) < len(place):
        return place[int(name)]
    raise ConfigError(f"override {assignment!r}: {name!r} is not a mapping or a list position.")
