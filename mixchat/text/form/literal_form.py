"""The grammar of a call's arguments that are literals and keep to a JSON schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from mixchat.base.errors import UsageError
from mixchat.text.form.schema import NOTES, alone, constants, escaped, json_rule, part_at, target_of
from mixchat.text.literals import GEMMA, literal_of
from mixchat.text.tool_call import properties_of

# The keys of a schema that have an effect in Gemma's form. Numbers and Python's literals follow the
# grammar of JSON.
_KEYS = {
    "string": {"type", "maxLength"},
    "array": {"type", "items", "minItems", "maxItems"},
    "object": {"type", "properties", "required", "additionalProperties"},
}
_WORDS = {"boolean": (True, False), "null": (None,)}
_NOTHING = '""'
_KEY = '/[^\\s:,{}\\[\\]<"]{1,64}/'  # a key of an object that may have any keys


def unsupported(keys: Iterable[str]) -> str:
    """Return why a strict tool with these keys in its schema is refused."""
    return f"not supported in this model's form of calls: {', '.join(sorted(keys))}"


class LiteralRules:
    """Makes the rules of one tool's arguments.

    In Gemma's form a text is the quote and then the rule `text`, which includes the second quote.
    Python's form is JSON, but for the words True, False and None.
    """

    def __init__(
        self,
        schema: dict[str, Any],
        name: str,
        spell: Callable[[str], str],
        *,
        quote: str,
        equals: str,
        comma: str,
        lenient: bool,
        open_text: Callable[[str, dict[str, Any]], str],
    ) -> None:
        """Take the schema of the arguments, and the name of their rule.

        spell: returns a text as a part of the grammar. quote: as in literals.py. open_text: returns
        the rule of this name for a text of Gemma's form with a schema. If `lenient`, keys that the
        form cannot follow have no effect.
        """
        self._schema = schema
        self._name = name
        self._spell = spell
        self._quote = quote
        self._equals = equals
        self._comma = spell(comma)
        self._lenient = lenient
        self._open_text = open_text
        self._rules: list[str] = []
        self._known: dict[str, str] = {}  # rules by the pointer of their schema

    def rules(self) -> list[str]:
        """Return all rules. Raises `UsageError` if they cannot keep to the schema."""
        arguments = self._pairs(self._schema, "", self._equals)
        return [*self._rules, f"{self._name}: {arguments}"]

    def _add(self, rule: str) -> str:
        """Add a rule, and return its name."""
        name = f"{self._name}_{len(self._rules)}"
        self._rules.append(f"{name}: {rule}")
        return name

    def _pairs(self, schema: dict[str, Any], pointer: str, equals: str) -> str:
        """Return the rule of an object's properties, of which only required ones have to come."""
        needed = schema.get("required", ())
        properties = properties_of(schema)
        # Gemma's template sorts the names, so its models have seen no other order.
        names = sorted(properties, key=str.lower) if self._quote == GEMMA else [*properties]
        # empty: the rule if no property has come yet. more: the rule after a property.
        empty = more = _NOTHING
        for name in reversed(names):
            value = self._value(properties[name], f"{pointer}/properties/{escaped(name)}")
            if not value:
                continue
            pair = self._add(f"{self._spell(name + equals)} {value}")
            first = f"{pair} {more}"
            next_pair = f"{self._comma} {pair}"
            empty = first if name in needed else self._add(f"{first} | {empty}")
            more = self._add(f"{next_pair if name in needed else f'({next_pair})?'} {more}")
        return empty

    def _value(self, schema: Any, pointer: str) -> str:
        """Return the rule of a value with the schema at a pointer, "" if there is none."""
        schema = schema if isinstance(schema, dict) else {}
        json_type = schema.get("type")
        refers = '"$ref"' in json.dumps(schema)
        if "enum" in schema or "const" in schema:
            return self._constants(constants(schema))
        if isinstance(schema.get("anyOf"), list) and schema["anyOf"]:
            self._check_keys(schema, {"anyOf"})
            parts = enumerate(schema["anyOf"])
            return self._any([self._value(part, f"{pointer}/anyOf/{i}") for i, part in parts])
        if isinstance(json_type, list) and json_type and not refers:
            return self._any([self._value({**schema, "type": each}, pointer) for each in json_type])
        json_type = json_type if isinstance(json_type, str) else ""
        if json_type in _WORDS:
            return self._constants(_WORDS[json_type])
        if self._quote == GEMMA and json_type not in ("integer", "number"):
            return self._in_gemmas_form(schema, json_type, pointer)
        schema = alone(self._schema, pointer) if refers else schema
        return self._add(json_rule(schema, lenient=self._lenient))

    def _in_gemmas_form(self, schema: dict[str, Any], json_type: str, pointer: str) -> str:
        target = target_of(schema)
        part = None if target is None else part_at(self._schema, target)
        if target is not None and part is not None:
            self._check_keys(schema, {"$ref"})
            if target not in self._known:
                # It is noted before its rule is made, because the rule may contain itself.
                self._known[target] = name = f"{self._name}_of_{len(self._known)}"
                self._rules.append(f"{name}: {self._value(part, target)}")
            return self._known[target]
        json_type = "" if json_type == "object" and not schema.get("properties") else json_type
        self._check_keys(schema, _KEYS.get(json_type, {"type"}))
        if json_type == "string":
            text = "text"
            if "maxLength" in schema:
                text = f"{self._name}_{len(self._rules)}"
                self._rules.append(self._open_text(text, schema))
            return f"{self._spell(self._quote)} {text}"
        if json_type == "array":
            value = self._value(schema.get("items"), f"{pointer}/items")
            most = schema.get("maxItems") if value else 0
            item = self._add(value or _NOTHING)
            return self._many(item, "[]", schema.get("minItems", 0), most)
        if json_type == "object":
            return f'"{{" {self._add(self._pairs(schema, pointer, ":"))} "}}"'
        return self._anything()

    def _check_keys(self, schema: dict[str, Any], known: set[str]) -> None:
        """Raise `UsageError` for keys without an effect in a strict tool's schema."""
        if not self._lenient and (unknown := {*schema} - known - NOTES):
            raise UsageError(unsupported(unknown))

    def _anything(self) -> str:
        """Return the rule of any literal in Gemma's form."""
        if "any" not in self._known:
            self._known["any"] = name = f"{self._name}_any"
            number = self._add(json_rule({"type": "number"}))
            pair = self._add(f'{_KEY} ":" {name}')
            text = f"{self._spell(self._quote)} text"
            words = self._constants([True, False, None])
            lists = (self._many(name, "[]"), self._many(pair, "{}"))
            self._rules.append(f"{name}: {' | '.join([text, number, words, *lists])}")
        return self._known["any"]

    def _many(self, item: str, brackets: str, least: int = 0, most: int | None = None) -> str:
        opening, closing = map(json.dumps, brackets)
        if most == 0:
            return f"{opening} {closing}"
        count = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        more = "" if most == 1 else f"({self._comma} {item}){count}"
        return f"{opening} ({item} {more}){'' if least else '?'} {closing}"

    def _constants(self, values: Iterable[Any]) -> str:
        return self._any([self._spell(literal_of(value, self._quote)) for value in values])

    def _any(self, rules: list[str]) -> str:
        possible = [rule for rule in rules if rule]
        return f"({' | '.join(possible)})" if possible else ""
