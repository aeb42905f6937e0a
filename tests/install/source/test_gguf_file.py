"""The reader of GGUF: what the package gguf writes is read, what is malformed is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from malformed_gguf import malformed

from mixchat.base.errors import MixchatError
from mixchat.base.progress import NoProgress
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.source.gguf_file import GgufFile, read_header
from mixchat.install.source.open_checkpoint import open_checkpoint
from mixchat.weights.format.manifest import Source
from mixchat.weights.matrix import gguf_format
from mixchat.weights.matrix.gguf_format import GgufSpec

KINDS = [
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4"),
    *("IQ1_S", "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"),
]


@pytest.fixture(scope="module")
def whole(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    checkpoint = make_checkpoint(vocab_size=262, num_hidden_layers=1)
    path = tmp_path_factory.mktemp("whole") / "whole.gguf"
    return gguf_files.write(checkpoint, path, "Q8_0").read_bytes()


def test_metadata_and_tensors_are_those_that_the_package_reads(whole, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(whole)
    reader = gguf.GGUFReader(path)
    with GgufFile(path) as file:
        for key, value in file.header.metadata.items():
            theirs = reader.fields[key].contents()
            assert np.array_equal(np.asarray(value, dtype=type(theirs)), theirs) or (
                np.float32(value) == np.float32(theirs)
            )
        assert len(file.header.specs) == len(reader.tensors)
        for tensor in reader.tensors:
            assert file.read(tensor.name).numpy().tobytes() == tensor.data.tobytes()
            assert file.header.start(tensor.name) == tensor.data_offset


def test_no_more_than_the_header_is_read(whole, monkeypatch):
    pieces = []

    def read(start: int, size: int) -> bytes:
        pieces.append((start, size))
        return whole[start : start + size]

    monkeypatch.setattr("mixchat.install.source.gguf_file._FIRST_READ_BYTES", 1000)
    header = read_header(read, len(whole), "x")
    end = min(header.start(spec.name) for spec in header.specs)
    assert sum(size for _, size in pieces) < 2 * end
    assert [start for start, _ in pieces] == [
        sum(s for _, s in pieces[:n]) for n in range(len(pieces))
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_read_as_the_package_reads_them(kind):
    """In pieces of rows, for each part of a stack, from random bytes."""
    number = gguf.GGMLQuantizationType[kind]
    spec = gguf_format.tensor_spec("x", number, (2, 700, 512), "file")
    assert isinstance(spec, GgufSpec)
    assert spec.weights == (2, 700, 512)
    random = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 60, spec.shape, dtype=torch.uint8, generator=random)
    expected = torch.from_numpy(gguf.dequantize(raw.numpy(), number)).to(torch.bfloat16)
    assert torch.equal(gguf_format.dense(spec, raw), expected)
    if kind == "MXFP4":
        part = GgufSpec("x", torch.uint8, spec.shape[1:], kind)
        taken = gguf_format.mxfp4(part, raw[1]).dense(torch.bfloat16)
        assert torch.equal(taken, expected[1])


def test_malformed_files_are_refused_in_one_line(whole, tmp_path):
    path, target = tmp_path / "x.gguf", tmp_path / "model"
    refused: dict[str, str | None] = {}
    for label, data in malformed(whole):
        path.write_bytes(data)
        try:
            with open_checkpoint(Source(str(path)), target, NoProgress()) as opened:
                CheckpointBuild(
                    opened, target, make_blueprint(opened.index, QuantizeOptions())
                ).run()
            refused[label] = None
        except MixchatError as error:
            refused[label] = str(error)
    assert {label for label, line in refused.items() if line is None} == set()
    assert all(len(line) < 400 and line.isprintable() for line in refused.values() if line)
    assert len(refused) > 100
