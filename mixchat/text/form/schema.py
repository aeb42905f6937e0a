"""Finds the part of a JSON schema that is at fault, which llguidance does not tell."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, cast
from urllib.parse import quote, unquote

from mixchat.base.errors import UsageError
from mixchat.text.form.grammar import NO_TEXT, find_fault
from mixchat.text.tool_call import properties_of

Schema: TypeAlias = "dict[str, Any]"

_MAX_POINTER = 120  # characters in a message
# Limits of the search for the part at fault. Each part costs as much as the whole schema.
_MAX_SEARCHED, _SEARCH_CPU_S = 300, 1.0  # parts, and seconds of computing
_SLIVER = 1e-9
_MAX_TIGHTENED = 1e6
# The bounds of an integer. Without them, a weak model writes digits until its answer is cut off.
# llguidance computes with 64 bits.
_LARGEST = 9 * 10**18
_MINIMA = ("minimum", "exclusiveMinimum")
_MAXIMA = ("maximum", "exclusiveMaximum")

NOTES = {"title", "description", "default", "examples", "$defs", "definitions", "$schema"}
"""The keys that exclude nothing."""

_UNMET = "Unsatisfiable schema: "
_UNKNOWN = re.compile(r'Unimplemented keys: \["(.*)"\]')
_FRAME = re.compile(
    r'failed to compile JSON schema: |failed to parse "%json": | at line \d+ column \d+$'
)
_IN_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_IN_OBJECTS = ("properties", "patternProperties")
_ALONE = ("items", "additionalProperties")
_DEFINITIONS = ("$defs", "definitions")
_BRANCHING = ("allOf", "anyOf", "oneOf")  # whose schemas hold for the same value
_COMBINING = {*_BRANCHING, "$ref"}
# Keys by which an object says what other properties it has, or needs.
_OPENING = {
    *("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"),
    *("minProperties", "dependentRequired", "dependentSchemas", "if"),
}
_MAX_INLINED = 100  # references in combined schemas
_LENIENT = {"x-guidance": {"lenient": True}}
# The blanks between two parts of JSON. Without a bound, a model can emit blanks until its answer is
# cut off.
_BLANKS = r"( |\n[ \t]{0,20})?"
JSON_START = "start: %json "  # begins a grammar of nothing but JSON
_HOME = "/$defs/mixchat"  # the place of a schema inside another one


def check_schema(schema: Schema) -> None:
    """Raise `UsageError` if a schema cannot be met or used, with the pointer of its part."""
    fault = _fault(schema)
    if fault is not None:
        pointer, fault = _deepest(schema, fault)
        verb = "met" if _unmet(fault) else "used"
        # In words, without llguidance's own terms.
        if unknown := _UNKNOWN.fullmatch(fault):
            reason = f"not supported: {unknown[1].replace(chr(34), '')}"
        elif fault.startswith("oneOf constraints"):
            reason = "oneOf is only supported where its schemas exclude each other; use anyOf"
        else:
            reason = fault.removeprefix(_UNMET)
        if len(pointer) > _MAX_POINTER:
            pointer = f"{pointer[: _MAX_POINTER // 2]}...{pointer[-_MAX_POINTER // 2 :]}"
        raise UsageError(f"the schema cannot be {verb} at #{pointer}: {reason}")


def schema_grammar(text: str) -> str:
    """Return the Lark grammar of the JSON that a schema, given as JSON, allows.

    Objects are closed unless they say otherwise. Raises `UsageError` as `check_schema` does. No
    part of a schema is ignored.
    """
    try:
        schema = json.loads(text)
        if not isinstance(schema, dict):
            raise UsageError("a JSON schema has to be an object")
        return f"start: {json_rule(checked_closed(schema))}"
    except RecursionError:
        raise UsageError("the schema is too deeply nested") from None


def _fault(schema: Schema) -> str | None:
    """Return what is wrong with a schema, in llguidance's words."""
    fault = find_fault(f"start: %json {json.dumps(schema)}")
    return None if fault is None else _FRAME.sub("", fault.message).replace(_HOME, "")


def _unmet(fault: str | None) -> bool:
    return fault is not None and (fault == NO_TEXT or fault.startswith(_UNMET))


def _deepest(schema: Schema, fault: str) -> tuple[str, str]:
    """Return the pointer of the deepest part with this fault, and what is wrong there."""
    pointer = ""
    seen = {""}
    began = time.process_time()
    while True:
        for candidate in _parts_of(schema, pointer):
            if (
                candidate in seen
                or len(seen) > _MAX_SEARCHED
                or time.process_time() - began > _SEARCH_CPU_S
            ):
                continue
            seen.add(candidate)
            deeper = _fault(alone(schema, candidate))
            if deeper is not None and (deeper == fault or (_unmet(deeper) and _unmet(fault))):
                pointer = candidate
                fault = deeper
                break
        else:
            return pointer, fault


def target_of(node: Schema) -> str | None:
    """Return the pointer to which a schema refers, None without one. A name is not a pointer."""
    target = node.get("$ref")
    if isinstance(target, str) and (target == "#" or target.startswith("#/")):
        return unquote(target[1:])
    return None


def part_at(schema: Any, pointer: str) -> Any:
    """Return the part of a schema at a JSON pointer, None if there is none."""
    for step in pointer.split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(schema, dict):
            schema = schema.get(name)
        elif isinstance(schema, list) and name.isdecimal() and int(name) < len(schema):
            schema = schema[int(name)]
        else:
            return None
    return schema


def _parts_of(schema: Schema, pointer: str) -> Iterator[str]:
    """Yield the pointers of the schemas that the schema at `pointer` applies, without its own."""
    node = part_at(schema, pointer)
    if not isinstance(node, dict):
        return
    if (target := target_of(node)) is not None:
        yield target
    for key in _IN_LISTS:
        if isinstance(node.get(key), list):
            yield from (f"{pointer}/{key}/{index}" for index in range(len(node[key])))
    for key in _IN_OBJECTS:
        if isinstance(node.get(key), dict):
            yield from (f"{pointer}/{key}/{escaped(name)}" for name in node[key])
    yield from (f"{pointer}/{key}" for key in _ALONE if isinstance(node.get(key), dict))


def alone(schema: Schema, pointer: str) -> Schema:
    """Return the part of a schema at `pointer` as a schema of its own, with right references."""
    whole = _moved({key: value for key, value in schema.items() if key != "$id"})
    return {"$defs": {"mixchat": whole}, "$ref": f"#{_HOME}{quote(pointer, safe='/~')}"}


def json_rule(schema: Schema, *, lenient: bool = False) -> str:
    """Return the part of a Lark grammar for the JSON of a schema.

    If `lenient`, keys that llguidance does not support have no effect.
    """
    options = {"whitespace_pattern": _BLANKS} | ({"lenient": True} if lenient else {})
    return f"%json {json.dumps({**tightened(schema), 'x-guidance': options})}"


def constants(schema: Schema) -> list[Any]:
    """Return the values that a schema lists, without those that its other keys exclude."""
    values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema.get("const")]
    excluding = {*schema} - NOTES - {"enum"}
    are_texts = schema.get("type") == "string" and all(isinstance(each, str) for each in values)
    if not excluding or (excluding == {"type"} and are_texts):
        return values
    return [each for each in values if not _unmet(_fault({**schema, "enum": [each], **_LENIENT}))]


def tightened(schema: Any) -> Any:
    """Return a schema with bounds for all integers, and exclusive minima that are a little higher.

    For a minimum above 8 and a maximum of 8.75, llguidance 1.9 allows 8 itself.
    """
    if not isinstance(schema, dict):
        return schema
    changed = _with_parts(schema, tightened)
    changed |= _missing_bounds(schema)
    least = schema.get("exclusiveMinimum")
    if isinstance(least, int | float) and 0 <= least <= _MAX_TIGHTENED:
        changed["exclusiveMinimum"] = least + _SLIVER
    return changed


def _missing_bounds(schema: Schema) -> Schema:
    """Return the bounds that a schema of integers lacks, or one of numbers with a single bound.

    A number without any bound gets none, because it could not have an exponent then.
    """
    # Without bounds, a weak model wrote digits until its answer was cut off.
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    minima = [schema[key] for key in _MINIMA if isinstance(schema.get(key), int | float)]
    maxima = [schema[key] for key in _MAXIMA if isinstance(schema.get(key), int | float)]
    is_integer = "integer" in types and "number" not in types
    is_listed = "enum" in schema or "const" in schema
    if is_listed or not (is_integer or minima or maxima):
        return {}
    below = {} if minima or min(maxima, default=0) <= -_LARGEST else {"minimum": -_LARGEST}
    above = {} if maxima or max(minima, default=0) >= _LARGEST else {"maximum": _LARGEST}
    return {**below, **above}


def closed(schema: Schema) -> Schema:
    """Return a schema whose objects have no properties besides the named ones.

    An object stays open if it says so by `additionalProperties`, or names no property. Schemas that
    hold for one object share their names: closed apart, they could not be met together.
    """
    try:
        return cast("Schema", _Closing(schema).closed(schema))
    except (_NotClosableError, RecursionError):
        return schema


def checked_closed(schema: Schema, *, lenient: bool = False) -> Schema:
    """Return the closed schema, or the schema itself if it could not be met then.

    If `lenient`, keys that llguidance does not support have no effect. Raises as `check_schema`.
    """
    options = _LENIENT if lenient else {}
    closed_schema = closed(schema)
    if closed_schema == schema or _fault({**closed_schema, **options}) is not None:
        check_schema({**schema, **options})
        return schema
    return closed_schema


class _NotClosableError(Exception):
    """References lead to no known part or to too many, or a key has no list of schemas."""


class _Closing:
    """Closes the objects of one schema."""

    def __init__(self, schema: Schema) -> None:
        self._whole = schema
        self._inlined = 0

    def closed(self, schema: Any) -> Any:
        """Return a part of the schema with closed objects."""
        if not isinstance(schema, dict):
            return schema
        combining = _COMBINING & schema.keys()
        other_keys = {*schema} - combining - NOTES - {"type"}
        branches = _branches(schema)
        is_lone = len(combining) == 1 and not other_keys and len(branches.get("allOf", "-")) == 1
        if not combining or is_lone:
            return _sealed(_with_parts(schema, self.closed))
        opened, names = self._opened(schema)
        if not names:
            return opened
        limit = {"properties": {name: {} for name in names}, "additionalProperties": False}
        return {**opened, "allOf": [*opened.get("allOf", ()), limit]}

    def _opened(self, schema: Any) -> tuple[Any, list[str] | None]:
        """Return a part without closing its own object, and the properties that it names.

        The names are None if the object has to stay open.
        """
        if not isinstance(schema, dict):
            return schema, []
        inner = {key: value for key, value in schema.items() if key not in _COMBINING}
        opened = _with_parts(inner, self.closed)
        named: list[list[str] | None] = [[*properties_of(schema)]]
        if _OPENING & schema.keys():
            named.append(None)
        branches = _branches(schema)
        if "$ref" in schema:
            # The definition itself is closed, so an open copy of it stands here.
            branches["allOf"] = [*branches.get("allOf", ()), self._target(schema)]
        for key, parts in branches.items():
            pairs = [self._opened(part) for part in parts]
            opened[key] = [part for part, _ in pairs]
            named += [names for _, names in pairs]
        if None in named:
            return opened, None
        return opened, [*dict.fromkeys(name for names in named for name in names or ())]

    def _target(self, schema: Schema) -> Any:
        target = target_of(schema)
        self._inlined += 1
        if target is None or self._inlined > _MAX_INLINED:
            raise _NotClosableError
        return part_at(self._whole, target)


def _branches(schema: Schema) -> dict[str, list[Any]]:
    """Return the lists of schemas that hold for the same value. Raises `_NotClosableError`."""
    branches = {key: schema[key] for key in _BRANCHING if key in schema}
    if not all(isinstance(parts, list) for parts in branches.values()):
        raise _NotClosableError
    return branches


def _sealed(schema: Schema) -> Schema:
    """Return a schema without others beside it that has only the named properties."""
    is_named = isinstance(schema.get("properties"), dict)
    if not is_named or (_OPENING - {"patternProperties"}) & schema.keys():
        return schema
    known = properties_of(schema)
    if "patternProperties" in schema and known != schema["properties"]:
        return schema  # a required name may match a pattern
    return {**schema, "properties": known, "additionalProperties": False}


def _moved(schema: Any) -> Any:
    """Return a schema whose references are right inside another one, at `_HOME`."""
    if not isinstance(schema, dict):
        return schema
    moved = _with_parts(schema, _moved)
    if target_of(schema) is not None:
        moved["$ref"] = f"#{_HOME}{schema['$ref'][1:]}"
    return moved


def _with_parts(schema: Schema, change: Callable[[Any], Any]) -> Schema:
    """Return a copy of a schema with changed parts. Constants and names stay as they are."""
    changed = dict(schema)
    for key, value in schema.items():
        if key in (*_IN_OBJECTS, *_DEFINITIONS) and isinstance(value, dict):
            changed[key] = {name: change(subschema) for name, subschema in value.items()}
        elif key in _IN_LISTS and isinstance(value, list):
            changed[key] = [change(subschema) for subschema in value]
        elif key in _ALONE:
            changed[key] = change(value)
    return changed


def escaped(name: str) -> str:
    """Return a name as a step of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")
