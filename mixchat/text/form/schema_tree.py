"""The parts of a JSON schema: their pointers, and schemas that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeAlias
from urllib.parse import quote, unquote

_IN_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_IN_OBJECTS = ("properties", "patternProperties")
_ALONE = ("items", "additionalProperties")
_DEFINITIONS = ("$defs", "definitions")
HOME = "/$defs/mixchat"  # of a schema inside another one
_MOST_UNFOLDED = 3_000  # schemas
_SLIVER, _MOST_TIGHTENED = 1e-9, 1e6

Schema: TypeAlias = "dict[str, Any]"


def target_of(node: Schema) -> str | None:
    """Return the pointer to which a schema refers, None without one: a name is no pointer."""
    target = node.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        return unquote(target[1:])
    return None


def depth_of(schema: Schema) -> int:
    """Return how many values may be inside each other at most, where references are followed.

    Each part is entered once: so it is the depth of the whole and of all that is referred to.
    """
    targets = {ref for node in _objects(schema) if isinstance(ref := node.get("$ref"), str)}
    parts = [part_at(schema, unquote(target[1:])) or schema for target in targets]
    return _depth(schema) + sum(1 + _depth(part) for part in parts)


def _objects(value: Any) -> Iterator[Schema]:
    """Yield all objects in a value of JSON."""
    if isinstance(value, dict):
        yield value
    for part in _inside(value):
        yield from _objects(part)


def _depth(value: Any) -> int:
    nested = isinstance(value, dict | list)
    return 1 + max(map(_depth, _inside(value)), default=0) if nested else 0


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def part_at(schema: Any, pointer: str) -> Any:
    """Return the part of a schema at a JSON pointer, None where there is none."""
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict):
            schema = schema.get(name)
        elif isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
            schema = schema[int(name)]
        else:
            return None
    return schema


def parts_of(schema: Schema, pointer: str) -> Iterator[str]:
    """Yield the pointers of the schemas that the one at `pointer` applies, itself left out."""
    node = part_at(schema, pointer)
    if not isinstance(node, dict):
        return
    if (target := target_of(node)) is not None:
        yield target
    for key in _IN_LISTS:
        if isinstance(node.get(key), list):
            yield from (f"{pointer}/{key}/{place}" for place in range(len(node[key])))
    for key in _IN_OBJECTS:
        if isinstance(node.get(key), dict):
            yield from (f"{pointer}/{key}/{_escaped(name)}" for name in node[key])
    yield from (f"{pointer}/{key}" for key in _ALONE if isinstance(node.get(key), dict))


def alone(schema: Schema, pointer: str) -> Schema:
    """Return a schema that is the part of another one at `pointer`, whose references it keeps."""
    whole = _moved({key: value for key, value in schema.items() if key != "$id"})
    return {"$defs": {"mixchat": whole}, "$ref": f"#{HOME}{quote(pointer, safe='/~')}"}


def tightened(schema: Any) -> Any:
    """Return a schema in which exclusive minima are a little higher.

    For more than 8 and at most 8.75, llguidance 1.9 allows 8 itself.
    """
    if not isinstance(schema, dict):
        return schema
    changed = _with_parts(schema, tightened)
    least = schema.get("exclusiveMinimum")
    if isinstance(least, int | float) and 0 <= least <= _MOST_TIGHTENED:
        changed["exclusiveMinimum"] = least + _SLIVER
    return changed


def _moved(schema: Any) -> Any:
    """Return a schema whose references are right inside another one, at `HOME`."""
    if not isinstance(schema, dict):
        return schema
    moved = _with_parts(schema, _moved)
    if target_of(schema) is not None:
        moved["$ref"] = f"#{HOME}{schema['$ref'][1:]}"
    return moved


def _with_parts(schema: Schema, change: Callable[[Any], Any]) -> Schema:
    """Return a copy of a schema with changed parts; constants and names stay as they are."""
    changed = dict(schema)
    for key, value in schema.items():
        if key in (*_IN_OBJECTS, *_DEFINITIONS) and isinstance(value, dict):
            changed[key] = {name: change(part) for name, part in value.items()}
        elif key in _IN_LISTS and isinstance(value, list):
            changed[key] = [change(part) for part in value]
        elif key in _ALONE:
            changed[key] = change(value)
    return changed


class _UnknownError(Exception):
    """A schema would have too many values, or references that have another root."""


class Unfolded:
    """A schema without references: each is replaced by what it refers to, and by `false` in there.

    A value that is finite can do without a part inside the same part, so where this cannot be met,
    nor can the schema. `loops` has the pointers of the parts that contain themselves; `schema` is
    None where it is not known.
    """

    def __init__(self, schema: Schema) -> None:
        self.loops: list[str] = []
        self.schema: Any = None
        self._whole, self._count = schema, 0
        with suppress(_UnknownError, RecursionError):
            self.schema = self._unfold(schema, frozenset({""}))

    def _unfold(self, schema: Any, inside: frozenset[str]) -> Any:
        if not isinstance(schema, dict):
            return schema
        self._count += 1
        has_own_root = "$id" in schema and schema is not self._whole
        if self._count > _MOST_UNFOLDED or has_own_root:
            raise _UnknownError
        kept = {key: schema[key] for key in schema if key not in ("$ref", *_DEFINITIONS)}
        kept = _with_parts(kept, lambda part: self._unfold(part, inside))
        target = target_of(schema)
        if target is None:
            return kept
        if target in inside:
            self.loops.append(target)
            return False
        part = self._unfold(part_at(self._whole, target), inside | {target})
        return {**kept, "allOf": [*kept.get("allOf", []), part]}


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
