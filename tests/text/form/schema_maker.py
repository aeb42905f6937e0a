"""Random JSON schemas that can be met, with every keyword that forms support."""

import random
from typing import Any

NAMES = ("a", "name", "x/y", "é", 'say "so"', "$ref", "definitions", "")
PATTERNS = ("^[a-f0-9]{4}$", "^(yes|no)$", "^[A-Z][a-z]*$", "b+")
Schema = dict[str, Any]


class SchemaMaker:
    """Makes schemas of bounded size: strings and lists have limits, so that answers end."""

    def __init__(self, seed: int) -> None:
        self._choose = random.Random(seed)

    def schema(self) -> Schema:
        """Return a schema; half of them have definitions, to which their parts may refer."""
        definitions = {"leaf": self._part(0), "tree": self._tree()}
        refers = self._choose.random() < 0.5
        whole = self._part(2, refs=tuple(definitions) if refers else ())
        return {"$defs": definitions, **whole} if refers else whole

    def _part(self, depth: int, refs: tuple[str, ...] = ()) -> Schema:
        kinds = [self._string, self._integer, self._number, self._fixed, self._choice]
        if refs and self._choose.random() < 0.3:
            return {"$ref": f"#/$defs/{self._choose.choice(refs)}"}
        if depth == 0:
            return self._choose.choice(kinds)()
        nested = self._choose.choice([self._object, self._object, self._array, self._any_of])
        return nested(depth, refs) if self._choose.random() < 0.8 else self._choose.choice(kinds)()

    def _string(self) -> Schema:
        if self._choose.random() < 0.4:
            return {"type": "string", "pattern": self._choose.choice(PATTERNS), "maxLength": 8}
        least = self._choose.randrange(3)
        return {"type": "string", "minLength": least, "maxLength": least + 5}

    def _integer(self) -> Schema:
        low = self._choose.randrange(-1000, 1000)
        steps = {"multipleOf": self._choose.choice([2, 5])} if self._choose.random() < 0.3 else {}
        return {"type": "integer", "minimum": low, "exclusiveMaximum": low + 50, **steps}

    def _number(self) -> Schema:
        low = self._choose.randrange(-50, 50)
        return {"type": "number", "exclusiveMinimum": low, "maximum": low + 0.75}

    def _fixed(self) -> Schema:
        return {"const": self._choose.choice([None, True, 1.5, "é\n", [1, {"b": []}], {}])}

    def _choice(self) -> Schema:
        return {"enum": self._choose.sample([None, False, 0, -1, "red", "gr\u00fcn", [], 2.5], 3)}

    def _object(self, depth: int, refs: tuple[str, ...]) -> Schema:
        names = self._choose.sample(NAMES, self._choose.randrange(4))
        made: Schema = {
            "type": "object",
            "properties": {name: self._part(depth - 1, refs) for name in names},
            "required": [name for name in names if self._choose.random() < 0.6],
            "additionalProperties": False,
        }
        if self._choose.random() < 0.3:
            more = {"properties": {"more": self._part(0)}, "required": ["more"]}
            made = {"allOf": [{**made, "additionalProperties": True}, more]}
        return made

    def _array(self, depth: int, refs: tuple[str, ...]) -> Schema:
        least = self._choose.randrange(3)
        first = [self._part(0) for _ in range(self._choose.randrange(2))]
        made = {
            "type": "array",
            "items": self._part(depth - 1, refs),
            "minItems": least,
            "maxItems": least + 2,
        }
        return {**made, "prefixItems": first} if first else made

    def _any_of(self, depth: int, refs: tuple[str, ...]) -> Schema:
        return {"anyOf": [self._part(depth - 1, refs), {"type": ["null", "boolean"]}]}

    def _tree(self) -> Schema:
        """Return a schema that refers to itself."""
        return {
            "type": "object",
            "properties": {
                "leaf": {"$ref": "#/$defs/leaf"},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]},
            },
            "required": ["next"],
            "additionalProperties": False,
        }
