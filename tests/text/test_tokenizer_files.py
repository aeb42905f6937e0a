"""The files of a tokenizer: which of them is read, and errors of one line for damaged ones."""

from pathlib import Path

import pytest
import text_builders as build

from mixchat.base.errors import CheckpointError
from mixchat.text.choose import load_tokenizer


def assert_refused(file: Path, match: str | None = None) -> None:
    """The tokenizer of the file's directory cannot be loaded, and one line names the file."""
    with pytest.raises(CheckpointError, match=match) as caught:
        load_tokenizer(file.parent)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    assert len(message) < len(str(file)) + 300


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[]", b"null", b'"text"', b"{", b"\x00" * 64, b"\xff\xfe\xfa", b"[" * 100_000,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 493443\n",
        b"<!DOCTYPE html>\n<html><body>Not found</body></html>", b'{"model": 5}',
        b'{"model": {"type": "BPE"}}', b'{"model": {"vocab": [1]}, "added_tokens": 3}',
        b'{"version": "1.0", "added_tokens": [{"id": 0}], "model": {"type": "BPE"}}',
        b'{"version": "1.0", "added_tokens": [7], "model": {"type": "BPE"}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
    ],
    ids=range(17),
)  # fmt: skip
def test_damaged_files_are_named_in_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name)


def test_a_file_cut_short_is_damaged(checkpoints, tmp_path):
    for source in (build.V1_FILE, checkpoints["byte-level"] / "tokenizer.json"):
        data = source.read_bytes()
        name = "tokenizer.json" if source.suffix == ".json" else "tokenizer.model"
        for size in (1, len(data) // 2, len(data) - 1):
            (tmp_path / name).write_bytes(data[:size])
            assert_refused(tmp_path / name)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_directory_is_not_a_file(name, tmp_path):
    (tmp_path / name).mkdir()
    assert_refused(tmp_path / name, "cannot be read")


def test_no_tokenizer_at_all(tmp_path):
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=r"no tokenizer\.model and no tokenizer\.json"):
            load_tokenizer(directory)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": [{"name": "rag", "template": "x"}]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "<a>"}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": "<a>"}}'),
        ("added_tokens.json", '{"<a>": "7"}'),
        ("added_tokens.json", '{"<a>": true}'),
        # A vocabulary has a place for each id, which took 80 GB.
        ("added_tokens.json", '{"<a>": 9999999999}'),
        ("added_tokens.json", '{"%s": "7"}' % ("a" * 1000)),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"999999999": {"content": "<a>"}}}'),
        ("special_tokens_map.json", "null"),
    ],
)
def test_damaged_settings_are_named_in_one_line(name, content, tmp_path):
    build.write_checkpoint(tmp_path, model_file=build.V1_FILE)
    (tmp_path / name).write_text(content)
    assert_refused(tmp_path / name)
