"""llama.cpp's process, played by a program that says how long it took."""

import contextlib
import os
import stat
import sys
from pathlib import Path

import peer
import peer_child
import pytest
from peer import Peer

from mixchat.base.errors import MissingDependencyError, ResourceError


def python_that_runs(directory: Path, program: str) -> str:
    """A "Python" that runs this program whatever it is told to run."""
    path = directory / "python"
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


ECHO = """
import sys
print("ready", flush=True)
for line in sys.stdin:
    context, counts = line.split(":")
    print(*(0.5 * int(count) + int(context) for count in counts.split()), flush=True)
"""


def test_rates_come_from_the_seconds_of_each_pass(tmp_path):
    with Peer(python_that_runs(tmp_path, ECHO), tmp_path / "model.gguf", 100) as running:
        assert running.prefill(64) == pytest.approx(2.0)
        assert running.decode(0, 10) == pytest.approx(2.0)
        assert running.decode(50, 10) == pytest.approx(1 / 50.5)


def test_a_peer_that_dies_is_named_with_its_last_words(tmp_path):
    program = "import sys; sys.exit('no such model')"
    with pytest.raises(ResourceError, match=r"^llama\.cpp ended early: .*no such model"):
        Peer(python_that_runs(tmp_path, program), tmp_path / "model.gguf", 100)


def test_a_python_without_llama_cpp_is_refused(tmp_path):
    with pytest.raises(MissingDependencyError, match="needs llama-cpp-python"):
        peer.require(python_that_runs(tmp_path, "import no_such_module"))
    peer.require(python_that_runs(tmp_path, ""))


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_in_another_format_is_made_of_one_that_goes(tmp_path, monkeypatch, fails):
    def requantize(source, target, name):
        if fails:
            raise SystemExit(name)
        target.write_text(f"{source.read_text()}, then {name}")

    monkeypatch.setattr(peer_child, "write_q4_0", lambda path, layers: path.write_text("Q4_0"))
    monkeypatch.setattr(peer_child, "requantize", requantize)
    model = tmp_path / "model.gguf"
    with pytest.raises(SystemExit) if fails else contextlib.nullcontext():
        peer_child.make(model, 1, "Q4_K_M")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["Q4_0, then Q4_K_M"] * (not fails)


def test_nothing_of_it_is_left_afterwards(tmp_path):
    with Peer(python_that_runs(tmp_path, ECHO), tmp_path / "model.gguf", 100) as running:
        process = running._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
