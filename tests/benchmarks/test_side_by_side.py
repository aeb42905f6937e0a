"""The script that measures llama.cpp beside mixchat; a program plays llama.cpp."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import side_by_side
from side_by_side import SideBySide, ratios
from test_peer import python_that_runs

from mixchat.base.errors import MissingDependencyError
from mixchat.bench.rounds import BenchTask

SCRIPTS = sorted(
    path
    for path in Path(__file__).parent.glob("*.py")
    if not path.name.startswith("test_") and "__main__" in path.read_text(encoding="utf-8")
)
ECHO = """
import sys
from pathlib import Path
if sys.argv[1] == "-c":
    sys.exit()
if sys.argv[2] == "make":
    Path(sys.argv[0]).with_name("made").write_text(" ".join(sys.argv[4:]))
else:
    assert sys.argv[2] == "serve", sys.argv
    print("ready", flush=True)
    for line in sys.stdin:
        print(*(0.5 * int(count) for count in line.split(":")[1].split()), flush=True)
"""
QUICK = ("--rounds", "2", "--turns", "1", "--tokens", "3", "--prompt", "16", "--device", "cpu")


class Peer:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def decode(self, context: int, tokens: int) -> float:
        assert tokens == 5
        self.asked.append(("decode", context))
        return 10.0

    def prefill(self, tokens: int) -> float:
        self.asked.append(("prefill", tokens))
        return 100.0


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known_limits: None) -> None:
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path / "home"))


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A "Python" that plays llama.cpp."""
    return python_that_runs(tmp_path, ECHO)


def test_both_are_measured_in_each_round():
    tasks = [BenchTask("decode", 0), BenchTask("decode", 40), BenchTask("prompt", 16)]
    bench: Any = SimpleNamespace(tasks=tasks, run=lambda: iter(tasks * 3))
    peer: Any = Peer()
    both = SideBySide(bench, peer, tokens=5, turns=1)
    assert len(list(both.run())) == 9
    assert peer.asked == [("decode", 0), ("decode", 40), ("prefill", 16)] * 3
    assert both.rates == [[10.0] * 3, [10.0] * 3, [100.0] * 3]


def test_a_ratio_is_that_of_a_round():
    assert ratios([10.0, 20.0, 40.0], [5.0, 20.0, 10.0], turns=1) == [2.0, 1.0, 4.0]
    # Of the same tokens in each turn, in 3 and in 6 seconds.
    assert ratios([1.0, 0.5, 8.0, 8.0], [0.2, 1.0, 4.0, 4.0], turns=2) == [2.0, 2.0]


def test_llama_cpp_stands_beside(tiny_model, python, tmp_path, capsys):
    arguments = (str(tiny_model), "--gguf", str(tmp_path / "x"), "--python", python)
    side_by_side.main([*arguments, *QUICK])
    head, decode, prompt = capsys.readouterr().out.splitlines()[5:]
    assert head.split()[-5:] == ["LLAMA.CPP", "TIMES", "MIN", "-", "MAX"]
    assert decode.split()[-5] == prompt.split()[-5] == "2.0"
    side_by_side.main([*arguments, *QUICK, "--json"])
    for task in json.loads(capsys.readouterr().out)["tasks"]:
        assert task["llama.cpp"] == [pytest.approx(2.0)] * 2
        assert task["to_peer"] > 0
    assert not (tmp_path / "home" / "models").exists()


def test_random_models_go_as_they_came(python, tmp_path, monkeypatch, tiny_model):
    from mixchat.bench import synthetic

    monkeypatch.setattr(
        synthetic, "write_synthetic", lambda place, *_: shutil.copytree(tiny_model, place)
    )
    for more, made in (
        ((), "2 Q4_0 --shape instruct"),
        (("--format", "Q3_K_M", "--shape", "qwen3"), "2 Q3_K_M --shape qwen3"),
    ):
        side_by_side.main(["--synthetic", "2", *more, "--python", python, *QUICK])
        assert (tmp_path / "made").read_text() == made
        assert list((tmp_path / "home" / "models").iterdir()) == []


def test_a_picture_is_drawn(tiny_model, python, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = (str(tiny_model), "--gguf", str(tmp_path / "x"), "--python", python)
    side_by_side.main([*arguments, *QUICK, "--png", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give a MODEL, or --synthetic LAYERS"),
        (("demo", "--synthetic", "4"), "give a MODEL, or --synthetic LAYERS"),
        (("demo",), "a MODEL needs --gguf FILE"),
    ],
)
def test_what_cannot_be_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        side_by_side.main(arguments)
    assert said in capsys.readouterr().err


def test_a_llama_cpp_that_is_not_there_is_said_before_anything_is_measured(tiny_model, tmp_path):
    python = python_that_runs(tmp_path, "raise SystemExit(1)")
    with pytest.raises(MissingDependencyError, match="needs llama-cpp-python and gguf"):
        side_by_side.main([str(tiny_model), "--gguf", "x", "--python", python, *QUICK])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_each_script_has_help(path, monkeypatch, capsys):
    """In this process, because each one of its own would import torch again."""
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(path), run_name="__main__")
    assert not ending.value.code
    assert capsys.readouterr().out.startswith("usage: ")
