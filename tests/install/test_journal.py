"""The journal of unfinished work: what it says is believed, a torn line is not."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from weight_tools import fetching, files_of, leave_unfinished, run, shard

from mixchat.weights.format.journal import JOURNAL_FILE, Journal
from mixchat.weights.format.manifest import Source
from mixchat.weights.format.workspace import workspace


def started(directory: Path, head: dict[str, object]) -> Journal:
    journal = Journal(directory)
    journal.start(head)
    return journal


@pytest.fixture
def checkpoint(small: Path, tmp_path: Path) -> Path:
    return shard(small, tmp_path / "shards", 3)


def naming(name: str) -> Callable[[bytes], bytes]:
    """Add a line for a file of this name to a journal."""
    line = json.dumps({"file": name, "sha256": {"x": "0" * 64}}).encode() + b"\n"
    return lambda data: data + line


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b'{"file": "experts-001.safete',
        lambda data: data + b"\0" * 100,
        lambda data: data + b'{"file": "x"}\n',
        lambda data: data + b"[]\n" + data.splitlines(keepends=True)[-1],
        lambda data: data.splitlines(keepends=True)[0],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: b"\xff\xfe\n" + data,
        # A name that was too long for the disk ended the download as a fault of our own.
        *(naming(name) for name in ("a" * 5_000, "", ".", "../../precious", "a\0b")),
    ],
)
def test_a_torn_line_and_a_file_that_no_model_has_count_for_nothing(
    checkpoint, whole, tmp_path, damage
):
    target = tmp_path / "installed"
    leave_unfinished(checkpoint, target)
    journal = workspace(target) / JOURNAL_FILE
    journal.write_bytes(damage(journal.read_bytes()))
    run(fetching(checkpoint, target), target)
    assert files_of(target) == whole


@pytest.mark.parametrize(
    "changes",
    [{"commit": []}, {"commit": {}}, {"revision": 5}, {"commit": "\ud800"}, {"repo": "\udfff"}],
)
def test_a_source_that_is_no_text_counts_for_nothing(tmp_path, changes):
    """Such a commit in the journal ended the download as a fault of our own."""
    source = {"repo": "org/model", "commit": "c", "revision": None}
    assert started(tmp_path, {"source": source}).source == Source(**source)
    assert started(tmp_path, {"source": source | changes}).source is None


def test_what_is_added_behind_a_torn_line_is_read_back(tmp_path):
    journal = started(tmp_path, {"a": 1})
    journal.add("x", {"one": "1"})
    journal.save()
    with open(tmp_path / JOURNAL_FILE, "ab") as file:
        file.write(b'{"file": "x", "sha')
    journal = started(tmp_path, {"a": 1})
    journal.add("x", {"two": "2"})
    journal.save()
    assert Journal(tmp_path).made == {"x": {"one": "1", "two": "2"}}


def test_what_the_journal_forgets_it_does_not_name_again(tmp_path):
    journal = started(tmp_path, {"a": 1})
    journal.add("x", {"one": "1", "two": "2"})
    journal.add("y", {"three": "3"})
    journal.save()
    journal.forget({"x": {"one"}})
    assert Journal(tmp_path).made == journal.made == {"x": {"two": "2"}, "y": {"three": "3"}}


def test_a_link_in_its_place_is_neither_read_nor_written_through(tmp_path):
    """Whoever could write into a model's directory could have any file appended to, or cut."""
    precious = tmp_path / "precious"
    started(tmp_path, {"of": "this"})
    before = (tmp_path / JOURNAL_FILE).rename(precious).read_bytes()
    (tmp_path / JOURNAL_FILE).symlink_to(precious)
    journal = started(tmp_path, {"of": "this"})
    journal.add("x", {"y": "z"})
    journal.save()
    assert precious.read_bytes() == before
    assert not (tmp_path / JOURNAL_FILE).is_symlink()


def test_a_pipe_in_its_place_does_not_make_a_list_of_models_wait(tmp_path):
    os.mkfifo(tmp_path / JOURNAL_FILE)
    assert Journal(tmp_path).head is None
