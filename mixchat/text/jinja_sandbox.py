"""Runs a chat template with the helpers that transformers gives it, and with limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

# How many elements all of a rendering's ranges may have together, and how long a product of a
# string or a list may be. Real templates count messages.
_MAX_ELEMENTS = 100_000


class TemplateRefusal(Exception):
    """The template called `raise_exception`: it has no way to say this conversation."""


def compile_template(source: str) -> Callable[..., str]:
    """Compile a chat template; the result renders it with the variables it is called with.

    Raises `jinja2.TemplateSyntaxError`. Rendering raises `TemplateRefusal` where the template
    refuses the messages, `OverflowError` where it goes beyond the limits, `jinja2.SecurityError`
    where it reaches for Python's insides, and whatever else a broken template makes happen.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_product(operator, left, right)
            return super().call_binop(context, operator, left, right)

    class Generation(Extension):
        """`{% generation %}` marks answers for training; here it only has content."""

        tags = {"generation"}  # noqa: RUF012 (Jinja declares it like this)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    del environment.globals["lipsum"]  # as much text as one asks for
    template = environment.from_string(source)

    def render(**variables: Any) -> str:
        return template.render({**variables, "range": _bounded_range()})

    return render


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _bounded_range() -> Callable[..., range]:
    left = _MAX_ELEMENTS

    def bounded(*args: int) -> range:
        nonlocal left
        numbers = range(*args)
        # len() itself overflows on the largest ranges, with the same exception.
        left -= len(numbers)
        if left < 0:
            raise OverflowError(f"its loops run more than {_MAX_ELEMENTS} times")
        return numbers

    return bounded


def _check_product(operator: str, left: Any, right: Any) -> None:
    """Raises `OverflowError` where `left * right` or `left ** right` would fill the memory."""
    if operator == "**":
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 4096:
            raise OverflowError(f"it raises a number to the power of {right}")
        return
    for sequence, times in ((left, right), (right, left)):
        too_long = isinstance(times, int) and hasattr(sequence, "__len__")
        if too_long and len(sequence) * times > _MAX_ELEMENTS:
            raise OverflowError(f"it repeats something {times} times")
