"""The environment of a chat template: the helpers that transformers gives it, and nothing more.

A template cannot reach Python's internals. Its time and memory are limited by the sandbox in which
it runs, not here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import NoReturn


class TemplateRefusal(Exception):
    """The template called `raise_exception`: it cannot express this conversation."""


def compile_template(source: str) -> Callable[..., str]:
    """Return a function that renders a chat template with the variables it is called with.

    Raises `jinja2.TemplateSyntaxError`. Rendering raises `TemplateRefusal` where the template
    refuses the messages, `jinja2.SecurityError` where it reaches for Python's internals, and any
    other exception where it is broken.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks answers for training; here it only has content."""

        tags = {"generation"}  # noqa: RUF012 (Jinja declares it like this)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source).render


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
