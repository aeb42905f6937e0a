"""The part of a JSON schema that is at fault, which llguidance does not tell."""

from __future__ import annotations

import json
import re
import time

from mixchat.base.errors import UsageError
from mixchat.text.form.grammar_fault import NO_TEXT, find_fault
from mixchat.text.form.schema_tree import HOME, Schema, Unfolded, alone, parts_of

_LONGEST = 120  # characters of a pointer
# For the search of the part at fault: parts, and seconds of computing. Each part costs as much as
# the whole schema.
_MOST, _SECONDS = 300, 1.0

_UNMET = "Unsatisfiable schema: "
_UNKNOWN = re.compile(r'Unimplemented keys: \["(.*)"\]')
_FRAME = re.compile(
    r'failed to compile JSON schema: |failed to parse "%json": | at line \d+ column \d+$'
)


def raise_schema_fault(schema: Schema) -> None:
    """Raise `UsageError` where a schema cannot be met or used, with the pointer of its part."""
    fault = _fault(schema)
    if fault is not None:
        pointer, fault = _deepest(schema, fault)
        verb = "met" if _unmet(fault) else "used"
        if len(pointer) > _LONGEST:
            pointer = f"{pointer[: _LONGEST // 2]}...{pointer[-_LONGEST // 2 :]}"
        raise UsageError(f"the schema cannot be {verb} at #{pointer}: {_in_words(fault)}")
    unfolded = Unfolded(schema)
    if unfolded.schema is not None and unfolded.loops and _unmet(_fault(unfolded.schema)):
        raise UsageError(
            f"the schema cannot be met at #{unfolded.loops[0]}: each value contains another one"
        )


def _fault(schema: Schema) -> str | None:
    """Return what is wrong with a schema, in llguidance's words."""
    found = find_fault(f"start: %json {json.dumps(schema)}")
    return None if found is None else _FRAME.sub("", found.message).replace(HOME, "")


def _unmet(fault: str | None) -> bool:
    return fault is not None and (fault == NO_TEXT or fault.startswith(_UNMET))


def _deepest(schema: Schema, fault: str) -> tuple[str, str]:
    """Return the pointer of the deepest part with this fault, and what is wrong there."""
    pointer, seen, began = "", {""}, time.process_time()
    while True:
        for part in parts_of(schema, pointer):
            if part in seen or len(seen) > _MOST or time.process_time() - began > _SECONDS:
                continue
            seen.add(part)
            deeper = _fault(alone(schema, part))
            if deeper is not None and (deeper == fault or (_unmet(deeper) and _unmet(fault))):
                pointer, fault = part, deeper
                break
        else:
            return pointer, fault


def _in_words(fault: str) -> str:
    """Return llguidance's message without its own terms."""
    if unknown := _UNKNOWN.fullmatch(fault):
        return f"not supported: {unknown[1].replace(chr(34), '')}"
    if fault.startswith("oneOf constraints"):
        return "oneOf is only supported where its schemas exclude each other; use anyOf"
    return fault.removeprefix(_UNMET)
