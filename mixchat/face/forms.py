"""Compiles the forms of answers for one model: JSON schemas, grammars, and calls of tools."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mixchat.base.errors import MixchatError
from mixchat.face.request import Form, FormError
from mixchat.text.form.call_form import CallForm
from mixchat.text.form.grammar import looks_like_gbnf
from mixchat.text.form.output_constraint import (
    PATIENT_S,
    Kind,
    OutputConstraint,
    checked,
    checked_schema,
    schema_text,
)

if TYPE_CHECKING:
    from mixchat.text.form.constraint import ConstraintCompiler, StartConstraint
    from mixchat.text.template import Template
    from mixchat.text.tokenizer import Tokenizer

_MAX_CACHED_FORMS, _MAX_CACHED = 64, 8_000_000  # forms, and characters of all of them


class FormCompiler:
    """Compiles forms, each within `seconds` of computing. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, template: Template, seconds: float = PATIENT_S):
        self._tokenizer = tokenizer
        self._template = template
        self._seconds = seconds
        self._compiler: ConstraintCompiler | None = None
        self._known: dict[bytes, tuple[OutputConstraint, int]] = {}  # by hash, with its characters

    def compile(self, form: Form, at_end: ExitStack | None = None) -> StartConstraint:
        """Return what starts the constraint of an answer. `at_end` ends the check if it is closed.

        Raises `FormError`.
        """
        from mixchat.text.form.constraint import ConstraintCompiler

        try:
            constraint = self._checked(form, at_end)
            if self._compiler is None:  # two threads may both make one
                stop_ids = self._template.stop_ids
                self._compiler = ConstraintCompiler(self._tokenizer, stop_ids, self._seconds)
            return self._compiler.compile(constraint)
        except MixchatError as error:
            explained = FormError(str(error), hint=error.hint)
            if isinstance(form, CallForm):
                explained.subject = "tools"
            elif isinstance(form, str):
                explained.subject = "grammar"
            raise explained from None

    def _checked(self, form: Form, at_end: ExitStack | None) -> OutputConstraint:
        """Return a form that the sandbox has checked, which costs up to seconds at first."""
        if isinstance(form, OutputConstraint):
            return form
        if isinstance(form, CallForm):
            text = form.to_text()
        else:
            text = json.dumps(form) if isinstance(form, str) else schema_text(form)
        key = hashlib.sha256(text.encode()).digest()
        if key in self._known:
            return self._known[key][0]
        if isinstance(form, CallForm):
            constraint = checked("calls", text, self._seconds, at_end)
        elif isinstance(form, str):
            syntax: Kind = "gbnf" if looks_like_gbnf(form) else "lark"
            constraint = checked(syntax, form, self._seconds, at_end)
        else:
            constraint = checked_schema(form, self._seconds, at_end)
        size = len(text) + len(constraint.grammar)
        if size <= _MAX_CACHED:
            cached = sum(size for _, size in list(self._known.values()))
            if len(self._known) >= _MAX_CACHED_FORMS or cached + size > _MAX_CACHED:
                self._known.clear()
            self._known[key] = constraint, size
        return constraint
