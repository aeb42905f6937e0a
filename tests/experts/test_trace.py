import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mixchat.errors import ResourceError, UsageError
from mixchat.experts.recording import RecordingRunner
from mixchat.experts.trace import Trace, TraceWriter, read_trace

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


def written(path: Path, *lines: object, end: str = "\n") -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines) + end)
    return path


def test_what_is_written_is_read(path: Path) -> None:
    with writer(path) as file:
        for forward in (THREE, ONE):
            for layer, selected in enumerate(forward):
                file.add(layer, selected)
    trace = read_trace(path)
    assert trace == Trace("tiny", 2, 4, 2, [THREE, ONE])
    assert [trace.tokens(forward) for forward in trace.forwards] == [3, 1]
    assert json.loads(path.read_text().splitlines()[0]) == HEADER


def test_a_pass_is_in_the_file_as_soon_as_it_ends(path: Path) -> None:
    file = writer(path)
    file.add(0, [0, 1])
    assert read_trace(path).forwards == []
    file.add(1, [2, 3])
    assert read_trace(path).forwards == [ONE]
    file.close()


def test_a_pass_that_was_interrupted_leaves_no_line(path: Path) -> None:
    with writer(path) as file:
        file.add(0, [3, 3])
        file.add(0, [0, 1])
        file.add(1, [2, 3])
        file.add(0, [3, 3])
    assert read_trace(path).forwards == [ONE]


def test_nothing_is_recorded_after_the_end(path: Path) -> None:
    file = writer(path)
    file.close()
    file.close()
    file.add(0, [0, 1])
    file.add(1, [2, 3])
    assert read_trace(path).forwards == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=r"full: cannot be written \(No space left"):
        writer(tmp_path / "full")


def test_a_disk_that_fills_up_is_an_error_once(path: Path) -> None:
    class Filling:
        room, closed = 9, 0

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            took, self.room = min(self.room, len(data)), self.room - min(self.room, len(data))
            return took

        def close(self) -> None:
            self.closed += 1

    with writer(path) as file:
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
def test_a_place_that_cannot_be_written_to_is_wrong_use(
    tmp_path: Path, name: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        writer(tmp_path / name)


def test_only_a_trace_is_replaced(path: Path) -> None:
    """Notes whose name was mistyped were overwritten."""
    for _ in range(2):
        writer(path).close()
    assert read_trace(path).forwards == []
    path.write_text("my notes")
    with pytest.raises(UsageError, match="exists, and was not written by"):
        writer(path)
    assert path.read_text() == "my notes"


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_read_is_wrong_use(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_trace(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"format": "other"}, "not the header of a routing trace"),
        ({"version": 2}, "a trace of version 2, not 1"),
        ({"model": 3}, "'model' is not text"),
        ({"layers": 0}, "'layers' is not a number from 1 to 1024"),
        ({"layers": True}, "'layers' is not"),
        ({"experts": 10**12}, "'experts' is not"),
        ({"experts_per_token": None}, "'experts_per_token' is not"),
        ({"experts_per_token": 5}, "more experts per token than there are"),
    ],
)
def test_a_header_that_is_none_is_refused(
    path: Path, changes: dict[str, object], what: str
) -> None:
    with pytest.raises(UsageError, match=f"a.trace: line 1: {what}"):
        read_trace(written(path, HEADER | changes))


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"[]\n", b"\xff\xfe", b"{" * 9**5, b"[" * 9**5, b"9" * 9999, b'{"format"']
)
def test_a_file_of_another_kind_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(UsageError, match="line 1: not the header of a routing trace"):
        read_trace(path)


@pytest.mark.parametrize(
    ("forward", "what"),
    [
        ({}, "not a list of 2 layers"),
        ([[0, 1]], "not a list of 2 layers"),
        ([[0, 1], 3], "layer 1 is not a list of experts"),
        ([[], []], "layer 0 is not a list of experts"),
        ([[0, 1, 2], [0, 1, 2]], "layer 0 has a wrong count of experts"),
        ([[0, 1], [0, 1, 2, 3]], "layer 1 has a wrong count of experts"),
        ([[0, 1], [0, 4]], "layer 1 has '4', not an expert from 0 to 3"),
        ([[0, -1], [0, 1]], "layer 0 has '-1', not an expert"),
        ([[0, 1.0], [0, 1]], "layer 0 has '1.0', not an expert"),
        ([[0, True], [0, 1]], "layer 0 has 'True', not an expert"),
    ],
)
def test_a_line_that_is_no_pass_is_refused_by_its_number(
    path: Path, forward: object, what: str
) -> None:
    with pytest.raises(UsageError, match=f"a.trace: line 3: {what}"):
        read_trace(written(path, HEADER, ONE, forward, ONE))


def test_a_line_that_is_not_json_is_refused(path: Path) -> None:
    path.write_text(json.dumps(HEADER) + "\n[[0, 1], [2\n" + json.dumps(ONE) + "\n")
    with pytest.raises(UsageError, match="line 2: not JSON"):
        read_trace(path)


def test_a_line_that_is_too_long_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixchat.experts.trace._LONGEST_LINE", 100)
    with pytest.raises(UsageError, match="line 2: not JSON"):
        read_trace(written(path, HEADER, [[0, 1] * 50, [0, 1] * 50]))


def test_a_last_line_that_a_crash_cut_short_does_not_count(path: Path) -> None:
    lines = written(path, HEADER, ONE, THREE).read_bytes().splitlines(keepends=True)
    whole = b"".join(lines)
    for size in range(len(lines[0]), len(whole) + 1):
        path.write_bytes(whole[:size])
        # Where only its newline is missing, a line is all there.
        first, second = size >= len(whole) - len(lines[2]) - 1, size >= len(whole) - 1
        assert read_trace(path).forwards == [ONE] * first + [THREE] * second


def test_the_tracing_runner_notes_the_choice_and_changes_nothing(path: Path) -> None:
    hidden, weights = torch.ones(3, 8), torch.rand(3, 2)
    calls = []

    class Runner:
        def run(self, *inputs: object, exact: bool = False) -> torch.Tensor:
            calls.append((*inputs, exact))
            return hidden * 2

    with writer(path) as file:
        tracing = RecordingRunner(Runner(), file.record)
        for layer, selected in enumerate(THREE):
            chosen = torch.tensor(selected).view(3, 2)
            assert torch.equal(tracing.run(layer, hidden, chosen, weights, exact=True), hidden * 2)
            assert calls[layer] == (layer, hidden, chosen, weights, True)
    assert read_trace(path).forwards == [THREE]


def test_a_pass_whose_last_layer_is_interrupted_is_not_noted(path: Path) -> None:
    class Runner:
        def run(self, layer: int, hidden: torch.Tensor, *rest: object, exact: bool = False) -> Any:
            if layer == 1:
                raise KeyboardInterrupt
            return hidden

    with writer(path) as file:
        tracing = RecordingRunner(Runner(), file.record)
        chosen = torch.tensor([[0, 1]])
        tracing.run(0, chosen, chosen, chosen)
        with pytest.raises(KeyboardInterrupt):
            tracing.run(1, chosen, chosen, chosen)
    assert read_trace(path).forwards == []


def test_traces_and_replays_need_no_torch() -> None:
    code = "import sys, mixchat.experts.trace, mixchat.planning.simulate as s\n"
    code += "s.hit_rate_table(s.synthetic_trace(tokens=3)); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
