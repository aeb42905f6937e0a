"""The programs of .github/python.md with prepared answers. test_main_job.py asks the demo."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mixchat
from tests.serving.web.scripted_model import scripted_model

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / ".github/python.md").read_text(encoding="utf-8")
PROGRAMS = dict(re.findall(r"^## (\d+)\. .*?\n```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
CALL = '<tool_call>\n{"name": "temperature", "arguments": {"city": "Oslo"}}\n</tool_call>'
# What the model says in each program, and what the program prints.
PREPARED: dict[str, tuple[list[str], str]] = {
    "1": (["Paris."], "Paris.\n"),
    "2": (["A fox. It ran."], "A fox. It ran.\n"),
    "3": (["Oslo.", "Its fjord."], "Oslo.\nIts fjord.\n"),
    "4": (["1. Fig 2. Kiwi 4. Plum"], "1. Fig 2. Kiwi \nstop_string 17 tokens, seed 7\n"),
    "5": ([" a fox."], "Once upon a time a fox.\n"),
    "6": (['{"name": "Rome", "inhabitants": 3000000}'], "Rome 3000000\n"),
    "7": (['"glad"', '"sad"'], "glad\nsad\n"),
    "8": ([CALL, "16."], 'temperature {"city": "Oslo"} -> 16 degrees\n16.\n'),
    "9": (["A fig.", "A fig.", "A fig."], "A fig.\nA fig.\nA fig.\n"),
    "10": (
        [f"{'1 ' * 25}{{hang}}", "Once{hang}"],
        f"{'1 ' * 20}1\nIt took too long.\ntemperature has to be 0 or more, not -1\n",
    ),
}


def with_answers(answers: list[str], **options: Any) -> Any:
    """A model that gives these answers, one after the other."""
    model = scripted_model(parallel=options.get("parallel", 1))
    encode = model.prompt

    def prompt(request: Any, at_end: Any = None) -> Any:
        made = encode(request, at_end)
        script = tuple(map(ord, f"say:{answers.pop(0)}"))
        return type(made)(**{**vars(made), "ids": made.ids + script})

    model.prompt = prompt
    return model


def test_the_page_has_ten_programs():
    assert list(PROGRAMS) == list(PREPARED)


@pytest.mark.parametrize("number", PREPARED)
def test_a_program_of_the_page_runs(number, monkeypatch, capsys):
    answers, printed = PREPARED[number]
    left = list(answers)
    monkeypatch.setattr(mixchat, "load", lambda name, **options: with_answers(left, **options))
    exec(compile(PROGRAMS[number], "python.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == printed
    assert not left


@pytest.mark.slow
def test_a_type_checker_accepts_the_programs_and_finds_a_wrong_option(tmp_path):
    for number, program in PROGRAMS.items():
        (tmp_path / f"program_{number}.py").write_text(program)
    wrong = 'import mixchat\n\nmixchat.load("demo").chat("Hi", temp=1).text().upper(1)\n'
    (tmp_path / "wrong.py").write_text(wrong)
    # With the options and the cache of the package's own check, which has read the package.
    config = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
    command = [sys.executable, "-m", "mypy", *config, "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [error.split(":")[0] for error in errors] == ["wrong.py"] * 2
    assert 'Unexpected keyword argument "temp"' in errors[0]
