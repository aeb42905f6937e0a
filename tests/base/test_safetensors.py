import contextlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from mixchat.base.errors import CheckpointError
from mixchat.base.safetensors import (
    Header,
    SafetensorsFile,
    SafetensorsWriter,
    TensorSpec,
    header_bytes,
    header_length,
)

TENSORS = {
    "a": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "b": torch.tensor(3.5),
    "c": torch.zeros(0, 5),
    "d": torch.arange(7, dtype=torch.uint8),
}


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with SafetensorsWriter(path, specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def raw_file(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def test_the_reference_reads_what_we_write(tmp_path):
    write(tmp_path / "x.safetensors", TENSORS)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_we_read_what_the_reference_writes(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert {spec.name for spec in file.header.specs} == set(TENSORS)
        for name, tensor in TENSORS.items():
            read = file.read(name)
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)


def test_data_begins_on_a_page(tmp_path):
    write(tmp_path / "x", {"d": TENSORS["d"]})
    assert (tmp_path / "x").read_bytes()[4096:] == bytes(range(7))


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    def interrupted() -> None:
        with SafetensorsWriter(tmp_path / "x", [TensorSpec("d", torch.uint8, (7,))]) as writer:
            writer.write("d", TENSORS["d"])
            assert not (tmp_path / "x").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_header_has_the_offset_of_each_tensor(tmp_path):
    write(tmp_path / "x", TENSORS)
    data = (tmp_path / "x").read_bytes()
    length = header_length(data[:8], len(data), "x")
    header = Header(data[8 : 8 + length], len(data), "x")
    assert [spec.name for spec in header.specs] == list(TENSORS)
    assert "a" in header
    assert "z" not in header
    start = header.start("d")
    assert data[start : start + header.spec("d").nbytes] == bytes(range(7))
    assert data[: 8 + length] == header_bytes(header.specs)


STACKED = {**TENSORS, "s": torch.arange(24, dtype=torch.int16).view(4, 3, 2), "s[9]": torch.ones(1)}


@pytest.mark.parametrize("part", range(4))
def test_a_part_of_a_stacked_tensor_is_read_by_its_number(tmp_path, part):
    write(tmp_path / "x", STACKED)
    with SafetensorsFile(tmp_path / "x") as file:
        name = f"s[{part}]"
        assert file.header.spec(name) == TensorSpec(name, torch.int16, (3, 2))
        assert torch.equal(file.read(name), STACKED["s"][part])
        assert [spec.name for spec in file.header.specs] == list(STACKED)


@pytest.mark.parametrize(
    "name", ["s[4]", "s[-1]", "s[01]", "s[]", "s[0][0]", "b[0]", "c[0]", "z[0]", "z"]
)
def test_a_tensor_or_a_part_that_is_not_there_is_named(tmp_path, name):
    write(tmp_path / "x", STACKED)
    message = f"no tensor {re.escape(repr(name))}"
    with SafetensorsFile(tmp_path / "x") as file, pytest.raises(CheckpointError, match=message):
        file.read(name)


def test_a_tensor_of_its_own_comes_before_a_part(tmp_path):
    """A spill file has parts of stacked tensors under their names."""
    write(tmp_path / "x", STACKED)
    with SafetensorsFile(tmp_path / "x") as file:
        assert torch.equal(file.read("s[9]"), torch.ones(1))


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "x.mixchat.tmp").symlink_to(outside)
    write(tmp_path / "x", TENSORS)
    assert outside.read_text() == "precious"


def test_a_file_cut_short_after_it_was_opened_is_an_error_not_a_signal(tmp_path):
    """A mapped file would kill the process with SIGBUS here."""
    write(tmp_path / "x", TENSORS)
    with SafetensorsFile(tmp_path / "x") as file:
        os.truncate(tmp_path / "x", 4100)
        with pytest.raises(CheckpointError, match="cut short"):
            file.read("a")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("numbers", [[2], [5, 0, 5, 1, 0], list(range(6))])
def test_rows_are_read_once_each_in_the_order_of_the_file(tmp_path, monkeypatch, dtype, numbers):
    matrix, reads, preadv = torch.randn(6, 8).to(dtype), list[int](), os.preadv
    write(tmp_path / "x", {"before": torch.zeros(3), "x": matrix, "behind": torch.zeros(3)})

    def spy(fd: int, buffers: list[memoryview], offset: int) -> int:
        reads.append(offset)
        return preadv(fd, buffers, offset)

    with SafetensorsFile(tmp_path / "x") as file:
        monkeypatch.setattr(os, "preadv", spy)
        rows = file.read_rows("x", torch.tensor(numbers))
        first, size = file.header.start("x"), 8 * dtype.itemsize
    assert rows.dtype == dtype
    assert torch.equal(rows, matrix[numbers])
    assert reads == [first + row * size for row in sorted(set(numbers))]


def test_a_row_that_is_missing_is_not_read_from_another_tensor(tmp_path):
    write(tmp_path / "x", {"before": torch.zeros(9), "x": torch.ones(2, 3), "y": torch.zeros(9)})
    with SafetensorsFile(tmp_path / "x") as file:
        for row in (-1, 2):
            with pytest.raises(AssertionError):
                file.read_rows("x", torch.tensor([1, row]))


def test_rows_of_a_file_that_was_cut_short_or_closed_are_an_error(tmp_path):
    write(tmp_path / "x", {"x": torch.ones(4, 8)})
    with SafetensorsFile(tmp_path / "x") as file:
        os.truncate(tmp_path / "x", file.header.start("x") + 2 * 32)
        assert file.read_rows("x", torch.tensor([1, 0])).shape == (2, 8)
        with pytest.raises(CheckpointError, match="cut short"):
            file.read_rows("x", torch.tensor([1, 2]))
        file.close()
        with pytest.raises(CheckpointError, match="cannot be read"):
            file.read_rows("x", torch.tensor([1, 0]))


LONG = "\n" * 5000
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        (b"", b"", None),
        (b"{", b"", None),
        (b"[]", b"", None),
        (b"null", b"", None),
        (b"\xff\xfe", b"", None),
        (b"[" * 5000, b"", None),
        ({"a": F32}, bytes(8), 2**62),
        ({"a": F32}, bytes(8), 10),
        ({"a": F32}, bytes(7), None),
        ({"a": F32}, bytes(9), None),
        ({"a": {**F32, "dtype": "F31"}}, bytes(8), None),
        ({"a": {**F32, "dtype": ["F32"]}}, bytes(8), None),
        ({"a": {**F32, "shape": [3]}}, bytes(8), None),
        ({"a": {**F32, "shape": [-2]}}, bytes(8), None),
        ({"a": {**F32, "shape": [2.0]}}, bytes(8), None),
        ({"a": {**F32, "shape": [True, 2]}}, bytes(8), None),
        ({"a": {**F32, "shape": "2"}}, bytes(8), None),
        ({"a": {**F32, "shape": [2**61, 8]}}, bytes(8), None),
        ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8), None),
        ({"a": {**F32, "data_offsets": [0]}}, bytes(8), None),
        ({"a": {**F32, "data_offsets": [4, 12]}}, bytes(12), None),
        ({"a": {**F32, "data_offsets": None}}, bytes(8), None),
        ({"a": {"dtype": "F32"}}, bytes(8), None),
        ({"a": 3}, bytes(8), None),
        ({"a": F32, "b": F32}, bytes(8), None),
        ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20), None),
        # The line had the whole name, which may be as long as the header.
        ({LONG: 3}, bytes(8), None),
        ({LONG: {**F32, "dtype": LONG}}, bytes(8), None),
        ({LONG: {**F32, "data_offsets": [4, 12]}}, bytes(12), None),
        ({LONG: {**F32, "shape": [2**61] * 8}}, bytes(8), None),
        ({LONG: {**F32, "shape": [3]}}, bytes(8), None),
    ],
)
def test_malformed_files_are_refused_in_one_line(tmp_path, header, data, length):
    path = raw_file(tmp_path / "x", header, data, length=length)
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_in_the_header_never_crashes(tmp_path, data) -> None:
    path = tmp_path / "x"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CheckpointError), SafetensorsFile(path) as file:
        for spec in file.header.specs:
            assert file.read(spec.name).shape == spec.shape
