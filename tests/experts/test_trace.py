import errno
import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch

from mixchat.base.errors import ResourceError, UsageError
from mixchat.experts.trace import RecordingRunner, TraceWriter

HEADER = {
    "format": "mixchat-trace",
    "version": 1,
    "model": "tiny",
    "layers": 2,
    "experts": 4,
    "experts_per_token": 2,
}
ONE = [[0, 1], [2, 3]]
THREE = [[0, 1, 1, 2, 3, 0], [3, 2, 1, 0, 3, 1]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.trace"


def writer(path: Path) -> TraceWriter:
    return TraceWriter(path, "tiny", layers=2, experts=4, experts_per_token=2)


def forwards(path: Path) -> list[list[list[int]]]:
    header, *lines = path.read_text().splitlines()
    assert json.loads(header) == HEADER
    return [json.loads(line) for line in lines]


def test_a_trace_is_a_header_and_a_line_for_each_pass(path):
    with closing(writer(path)) as file:
        for forward in (THREE, ONE):
            for layer, selected in enumerate(forward):
                file.add(layer, selected)
    assert forwards(path) == [THREE, ONE]


def test_a_pass_is_in_the_file_as_soon_as_it_ends(path):
    file = writer(path)
    file.add(0, [0, 1])
    assert forwards(path) == []
    file.add(1, [2, 3])
    assert forwards(path) == [ONE]
    file.close()


def test_a_pass_that_was_interrupted_leaves_no_line(path):
    with closing(writer(path)) as file:
        file.add(0, [3, 3])
        file.add(0, [0, 1])
        file.add(1, [2, 3])
        file.add(0, [3, 3])
    assert forwards(path) == [ONE]


def test_a_disk_that_fills_up_is_an_error_once(path):
    class Filling:
        room, closed = 9, 0

        def write(self, data):
            if not self.room:
                raise OSError(28, "No space left on device")
            took, self.room = min(self.room, len(data)), self.room - min(self.room, len(data))
            return took

        def close(self):
            self.closed += 1

    with closing(writer(path)) as file:
        file._file.close()
        disk = file._file = Filling()
        file.add(0, [0, 1])
        with pytest.raises(ResourceError, match=r"a.trace: cannot be written"):
            file.add(1, [2, 3])
        file.add(0, [0, 1])
        file.add(1, [2, 3])
    assert disk.closed == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing/a.trace", "there is no directory"), (".", "exists, and was not written by")],
)
def test_a_place_that_cannot_be_written_to_is_wrong_use(tmp_path, name, said):
    with pytest.raises(UsageError, match=said):
        writer(tmp_path / name)


def test_only_a_trace_is_replaced(path):
    """Notes whose name was mistyped were overwritten."""
    for _ in range(2):
        writer(path).close()
    assert forwards(path) == []
    path.write_text("my notes")
    with pytest.raises(UsageError, match="exists, and was not written by"):
        writer(path)
    assert path.read_text() == "my notes"


def test_the_tracing_runner_notes_the_choice_and_changes_nothing(path):
    hidden, weights = torch.ones(3, 8), torch.rand(3, 2)
    calls = []

    class Runner:
        def run(self, *inputs, exact=False):
            calls.append((*inputs, exact))
            return hidden * 2

    with closing(writer(path)) as file:
        tracing = RecordingRunner(Runner(), file.record)
        for layer, selected in enumerate(THREE):
            chosen = torch.tensor(selected).view(3, 2)
            assert torch.equal(tracing.run(layer, hidden, chosen, weights, exact=True), hidden * 2)
            assert calls[layer] == (layer, hidden, chosen, weights, True)
    assert forwards(path) == [THREE]


def test_traces_need_no_torch():
    code = "import sys, mixchat.experts.trace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_trace_that_cannot_be_begun_leaves_no_file(path, monkeypatch):
    """A full disk left an empty file, which looks like a trace."""
    from mixchat.base.output_file import OutputFile

    class Full:
        def __init__(self, file):
            self.fileno, self.close = file.fileno, file.close

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = OutputFile.open
    monkeypatch.setattr(OutputFile, "open", lambda output: Full(opened(output)))
    with pytest.raises(ResourceError, match="No space left"):
        writer(path)
    assert not path.exists()
