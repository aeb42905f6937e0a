"""Compiles the forms that requests ask for, for the tokens of the model that is served."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any

from mixchat.text.form.grammar import looks_like_gbnf
from mixchat.text.form.output_constraint import (
    HASTY_S,
    OutputConstraint,
    checked_grammar,
    checked_schema,
    json_object,
)

if TYPE_CHECKING:
    from mixchat.serving.requests.response_format import Compile
    from mixchat.serving.service import Service
    from mixchat.text.form.constraint import ConstraintCompiler, TokenConstraint

_MOST_KEPT = 64  # forms; programs ask with the same schema again and again


def forms_of(service: Service, seconds: float = HASTY_S) -> Compile:
    """Return what compiles the forms of a service's answers.

    Each may take so many seconds of computing.
    """
    checked: dict[str, OutputConstraint] = {}

    @cache
    def compiler() -> ConstraintCompiler:
        from mixchat.text.form.constraint import ConstraintCompiler

        return ConstraintCompiler(service.tokenizer, service.template.stop_ids, seconds)

    def check(given: dict[str, Any] | str, at_end: ExitStack | None) -> OutputConstraint:
        if isinstance(given, dict):
            return checked_schema(given, seconds, at_end)
        return checked_grammar(given, looks_like_gbnf(given), seconds, at_end)

    def compile_form(
        given: dict[str, Any] | str | None, at_end: ExitStack | None = None
    ) -> Callable[..., TokenConstraint]:
        if given is None:
            return compiler().compile(json_object()).start
        key = json.dumps(given)
        if key not in checked:
            form = check(given, at_end)
            if len(checked) >= _MOST_KEPT:
                checked.clear()
            checked[key] = form
        return compiler().compile(checked[key]).start

    return compile_form
