"""Compiles the forms that requests ask for, for the tokens of the model that is served."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from mixchat.text.form.form import any_grammar, json_object, json_schema

if TYPE_CHECKING:
    from mixchat.serving.requests.response_format import Compile
    from mixchat.serving.service import Service
    from mixchat.text.form.constraint import FormCompiler, FormConstraint


def forms_of(service: Service) -> Compile:
    """Return what compiles the forms of a service's answers; the first one takes half a second."""

    @cache
    def compiler() -> FormCompiler:
        from mixchat.text.form.constraint import FormCompiler

        return FormCompiler(service.tokenizer, service.template.stop_ids)

    def compile_form(given: dict[str, Any] | str | None) -> Callable[..., FormConstraint]:
        if isinstance(given, str):
            form = any_grammar(given)
        else:
            form = json_object() if given is None else json_schema(given)
        return compiler().compile(form).start

    return compile_form
