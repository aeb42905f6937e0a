"""KV caches in files, from one model to the next."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mixchat.base.progress import QuietReporter
from mixchat.face.events import End
from mixchat.face.kept_caches import remove_server_caches

PROMPTS = [[3 + (number * 7 + n * 11) % 250 for n in range(30)] for number in (1, 2)]


class NotingReporter(QuietReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def reporter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> NotingReporter:
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    return NotingReporter()


def answers(load: Any, reporter: NotingReporter) -> tuple[list[Any], list[int]]:
    """The texts of answers to the prompts, and the tokens of the prompts that were cached."""
    with load(keep_caches=True, reporter=reporter) as model:
        events = [list(model.generate(prompt, max_tokens=8, temperature=0)) for prompt in PROMPTS]
    ends = [each[-1] for each in events]
    assert all(isinstance(end, End) for end in ends)
    return [end.message for end in ends], [end.stats.reused_tokens for end in ends]


def test_kv_caches_in_files_serve_the_next_model(load, installed, reporter, tmp_path):
    messages, cached = answers(load, reporter)
    assert cached == [0, 0]
    assert answers(load, reporter) == (messages, [len(prompt) - 1 for prompt in PROMPTS])
    files = sorted((tmp_path / "server" / installed.name).iterdir())
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    files[0].write_bytes(files[0].read_bytes()[:-1] + b"x")
    assert answers(load, reporter)[0] == messages
    assert len(reporter.notes) == 1
    assert "it will be written again" in reporter.notes[0]


def test_a_directory_that_cannot_be_made_for_kv_caches_is_noted(load, reporter, tmp_path):
    """An error there ended the thread of the model, whose memory stayed in use."""
    (tmp_path / "server").write_bytes(b"")
    answers(load, reporter)
    assert len(reporter.notes) == 1
    assert "KV caches cannot be saved" in reporter.notes[0]


def test_a_directory_of_kv_caches_that_cannot_be_read_costs_a_line_and_not_the_start(
    load, reporter, tmp_path
):
    """An error there ended the start of the server."""
    (tmp_path / "server").symlink_to("server")
    answers(load, reporter)
    assert reporter.notes[0].startswith("KV caches cannot be read")


def test_removing_caches_leaves_the_files_of_others(monkeypatch, tmp_path):
    """The whole directory was removed with its model."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    directory = tmp_path / "server" / "tiny"
    (directory / "notes").mkdir(parents=True)
    for name in ("0.kv", "12.kv", "0.kv.x1.mixchat.tmp", "mine.kv", "0.kv.tmp"):
        (directory / name).write_bytes(b"x")
    remove_server_caches("tiny")
    remove_server_caches("other")
    assert {path.name for path in directory.iterdir()} == {"notes", "mine.kv", "0.kv.tmp"}
    shutil.rmtree(directory)
    directory.mkdir()
    remove_server_caches("tiny")
    assert not directory.exists()
