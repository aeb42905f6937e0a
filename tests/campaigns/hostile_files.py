"""Malformed safetensors files, here and on the hub: each is refused with one line."""

import json
import os
import shutil
import struct
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rig
from counted_hub import Hub
from hostile import Found, judged

NAME = "model.safetensors"
HARMLESS = ("a duplicate key", "metadata that is no object", "an empty tensor more", "whole")


def campaign(work: Path, found: Found, options: Namespace) -> None:
    """Try every malformed file as a local shard and as one on the hub."""
    whole = rig.make_checkpoint(work / "whole", 2, 1 << 40, **rig.TINY)
    (shard,) = whole.glob("*-of-*")
    (whole / "model.safetensors.index.json").unlink()
    shard.rename(whole / NAME)
    source = work / "bad"
    shutil.copytree(whole, source)
    hub = Hub(whole)
    home, cache = (Path(os.environ[name]) for name in ("MIXCHAT_HOME", "HF_HOME"))
    try:
        for label, data in _malformed((whole / NAME).read_bytes()):
            (source / NAME).write_bytes(data)
            hub.set(directory=str(source))
            for where, model in (("here", str(source)), ("on the hub", rig.REPO)):
                for directory in (home, cache):
                    shutil.rmtree(directory, ignore_errors=True)
                code = judged(
                    rig.mixchat("download", model), work / "out", f"{label}, {where}", found
                )
                found.counts[f"{where}: {'refused' if code else 'harmless'}"] += 1
                if code == 0 and label not in HARMLESS:
                    found.failures.append(f"{label}, {where}: taken")
                if code and label == "whole":
                    found.failures.append(f"{label}, {where}: refused")
    finally:
        hub.close()


def _file(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _malformed(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Each file by what is wrong with it."""
    length = struct.unpack("<Q", whole[:8])[0]
    text, data = whole[8 : 8 + length], whole[8 + length :]
    header = json.loads(text)
    last = max((name for name in header if name[0] != "_"), key=lambda n: header[n]["data_offsets"])
    size = len(data)

    def entry(**changes: Any) -> bytes:
        return _file({**header, last: {**header[last], **changes}}, data)

    def bfloat(value: int) -> bytes:
        start = header["model.norm.weight"]["data_offsets"][0]
        return _file(text, data[:start] + struct.pack("<H", value) + data[start + 2 :])

    start, end = header[last]["data_offsets"]
    yield "whole", whole
    yield "nothing", b""
    yield "seven bytes", whole[:7]
    yield "a length of no header", struct.pack("<Q", 0) + data
    yield "a length beyond the file", struct.pack("<Q", 2**40) + whole[8:]
    yield "a length of 2**64 - 1", b"\xff" * 8 + whole[8:]
    yield "a negative length", struct.pack("<q", -5) + whole[8:]
    yield "a header of 99 MB of brackets", _file(b"[" * 99_000_000, b"")
    yield "a header of 99 MB of entries", _file(_entries(99_000_000), b"")
    yield "a header above the limit", _file(b" " * 101_000_000, b"")
    yield "nested 100,000 deep", _file(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, data)
    yield "UTF-8 that is none", _file(b'{"\xff\xfe": 1}', data)
    yield "UTF-16", _file(text.decode().encode("utf-16"), data)
    yield "a list", _file([1, 2], data)
    yield "null", _file(None, data)
    yield "an entry that is a number", _file({**header, last: 5}, data)
    yield "an entry without type", _file({**header, last: {"shape": [1]}}, data)
    yield "an unknown type", entry(dtype="F8_E9M9")
    yield "a type that is a list", entry(dtype=["BF16"])
    yield "another type of the same size", entry(dtype="F16" if size < 0 else "I16")
    yield "another type of another size", entry(dtype="F64")
    yield "a shape below zero", entry(shape=[-1, *header[last]["shape"][1:]])
    yield "two sizes below zero", entry(shape=[-1, -(end - start) // 2])
    yield "a huge shape", entry(shape=[2**62, 2**62])
    yield "a shape of zero", entry(shape=[0])
    yield "a shape of floats", entry(shape=[1.5, 2.0])
    yield "a shape of true", entry(shape=[True, (end - start) // 2])
    yield "a shape of 10,000 sizes", entry(shape=[1] * 10_000)
    yield (
        "a shape with a number of 5,000 digits",
        _file(text.replace(b'"shape":[', b'"shape":[' + b"9" * 5000 + b",", 1), data),
    )
    yield "offsets below zero", entry(data_offsets=[-10, end])
    yield "offsets the other way round", entry(data_offsets=[end, start])
    yield "offsets beyond the end", entry(data_offsets=[start, end + 2**40])
    yield "offsets of floats", entry(data_offsets=[float(start), float(end)])
    yield "three offsets", entry(data_offsets=[start, end, end])
    yield "overlapping", entry(data_offsets=[start - 2, end - 2])
    yield (
        "a hole",
        _file(
            {**header, last: {**header[last], "data_offsets": [start + 2, end + 2]}}, data + b"\0\0"
        ),
    )
    yield "cut short by a byte", whole[:-1]
    yield "a byte too many", whole + b"\0"
    yield "cut in half", whole[: len(whole) // 2]
    yield "a tensor missing", _file({n: e for n, e in header.items() if n != last}, data[:start])
    yield (
        "a tensor more",
        _file(
            {**header, "evil": {"dtype": "U8", "shape": [1], "data_offsets": [size, size + 1]}},
            data + b"\0",
        ),
    )
    yield (
        "an empty tensor more",
        _file(
            {**header, "evil": {"dtype": "U8", "shape": [0], "data_offsets": [size, size]}}, data
        ),
    )
    yield (
        "a name of 10,000 characters",
        _file(
            {
                **header,
                "e" * 10_000: {"dtype": "U8", "shape": [1], "data_offsets": [size, size + 1]},
            },
            data + b"\0",
        ),
    )
    duplicate = b'{"model.norm.weight":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    yield "a duplicate key", _file(duplicate + text[1:], data)
    yield "metadata that is no object", _file({**header, "__metadata__": 5}, data)
    yield "NaN in a weight", bfloat(0x7FC0)
    yield "infinity in a weight", bfloat(0xFF80)
    yield "a pickle", b"\x80\x04\x95" + b"c" * 1000
    yield "a zip", b"PK\x03\x04" + whole[4:]


def _entries(size: int) -> bytes:
    one = b'"%08d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    body = b"".join(one % number for number in range(size // len(one % 0)))
    return b"{" + body[:-1] + b"}"
