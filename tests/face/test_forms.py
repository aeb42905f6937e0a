"""Forms of answers: how many compiled ones are kept."""

from unittest.mock import Mock

from mixchat.face import forms
from mixchat.text.form import constraint
from mixchat.text.form.output_constraint import OutputConstraint


def test_compiled_forms_are_kept_up_to_a_size(monkeypatch):
    """Forms as large as a body were kept for good, with the body's text: 64 times 4 MB."""
    checks = []

    def check(kind, text, *limits):
        checks.append(text)
        return OutputConstraint("x" * len(text), text=text)

    monkeypatch.setattr(forms, "checked", check)
    monkeypatch.setattr(constraint, "ConstraintCompiler", Mock())
    monkeypatch.setattr(forms, "_MAX_CACHED", 1000)
    compile_form = forms.FormCompiler(Mock(), Mock()).compile
    for size, count in [(100, 1), (100, 1), (300, 2), (100, 2), (2000, 3), (100, 3), (2000, 4)]:
        compile_form("start: " + "a" * size)
        assert len(checks) == count
    compile_form("start: " + "b" * 300)  # all others are dropped for it
    compile_form("start: " + "a" * 100)
    assert len(checks) == 6
