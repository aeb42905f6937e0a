"""Malformed GGUF files, made from a whole one, each by what is wrong with it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from mixchat.install.source.gguf_file import read_header

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of scalars
_ALIGNMENT = b"general.alignment"
_U8, _U32, _F32, _TEXT, _LIST = 0, 4, 6, 8, 9


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    """Return an entry of the metadata."""
    return text(key) + struct.pack("<I", kind) + value


def header(tensors: int, entries: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + rest


def malformed(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield each file by what is wrong with it. `whole` is a Mixtral in Q8_0."""
    tensors, entries = struct.unpack_from("<QQ", whole, 8)

    def more(*added: bytes) -> bytes:
        return header(tensors, entries + len(added), b"".join(added)) + whole[24:]

    def number(key: bytes, value: int) -> bytes:
        own = entry(key, _U32, b"")
        return _written(whole, whole.index(own) + len(own), struct.pack("<I", value))

    yield "nothing", b""
    yield "three bytes", whole[:3]
    yield "another magic", b"GGML" + whole[4:]
    for version in (0, 1, 4, 3 << 24, 2**32 - 1):
        yield f"version {version}", whole[:4] + struct.pack("<I", version) + whole[8:]
    for count in (0, 2**20, 2**63, 2**64 - 1):
        yield f"{count} tensors", header(count, entries) + whole[24:]
        yield f"{count} entries", header(tensors, count) + whole[24:]
    yield "a key of 2**62 bytes", header(0, 1, struct.pack("<Q", 2**62))
    yield "a key of 2,000 bytes", more(entry(b"k" * 2000, _U8, b"\1"))
    yield "a key that is not UTF-8", more(entry(b"\xff\xfe", _U8, b"\1"))
    yield "a text of 2**63 bytes", more(entry(b"k", _TEXT, struct.pack("<Q", 2**63)))
    yield "a text that is not UTF-8", more(entry(b"k", _TEXT, text(b"\xff")))
    yield "a text of 70 MB", more(entry(b"k", _TEXT, text(b" " * 70_000_000)))
    for kind in (13, 255, 2**32 - 1):
        yield f"an entry of type {kind}", more(entry(b"k", kind, b"\0" * 8))
    for count in (2**40, 2**64 - 1, 5_000_000):
        counted = struct.pack("<IQ", _U8, count)
        yield f"a list of {count}", more(entry(b"k", _LIST, counted))
        yield f"a list of {count} texts", more(entry(b"k", _LIST, struct.pack("<IQ", _TEXT, count)))
    yield "a key twice", more(entry(b"k", _U8, b"\1"), entry(b"k", _U8, b"\1"))
    yield "lists in lists", more(entry(b"k", _LIST, struct.pack("<IQ", _LIST, 1) * 10_000))
    yield (
        "900,000 empty texts",
        more(entry(b"k", _LIST, struct.pack("<IQ", _TEXT, 900_000) + bytes(8 * 900_000))),
    )
    for value in (0, 3, 2**31 + 1):
        yield f"an alignment of {value}", more(entry(_ALIGNMENT, _U32, struct.pack("<I", value)))
    yield "an alignment in words", more(entry(_ALIGNMENT, _TEXT, text(b"32")))
    yield "an alignment in a fraction", more(entry(_ALIGNMENT, _F32, struct.pack("<f", 32)))
    yield (
        "the architecture a list",
        whole.replace(
            entry(b"general.architecture", _TEXT, text(b"llama")),
            entry(b"general.architecture", _LIST, struct.pack("<IQ", _U8, 1) + b"\1"),
        ),
    )
    yield "another architecture", whole.replace(text(b"llama"), text(b"lamma"), 1)
    for key, values in {
        "block_count": (0, 3, 2**31, 2**32 - 1),
        "embedding_length": (0, 1, 65, 2**32 - 1),
        "feed_forward_length": (0, 2**32 - 1),
        "attention.head_count": (0, 3, 2**32 - 1),
        "attention.head_count_kv": (0, 3, 2**32 - 1),
        "expert_count": (0, 1, 2**20, 2**32 - 1),
        "expert_used_count": (0, 200, 2**32 - 1),
        "context_length": (0, 2**32 - 1),
        "rope.dimension_count": (0, 1, 7, 2**32 - 1),
    }.items():
        for value in values:
            yield f"{key} {value}", number(f"llama.{key}".encode(), value)
    yield from _of_tensors(whole)
    for length in (24, 60, len(whole) // 2, len(whole) - 40):
        yield f"cut after {length} bytes", whole[:length]
    yield "bytes too many", whole + bytes(64)
    yield (
        "a tokenizer of no tokens",
        whole.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz", 1),
    )
    yield "another kind of tokenizer", whole.replace(text(b"gpt2"), text(b"gpt9"), 1)
    yield "other rules", whole.replace(text(b"smollm"), text(b"smallm"), 1)
    yield (
        "two equal tokens",
        whole.replace(text(b"hell"), text("ll\u0100".encode()), 1).replace(
            text(b"ll"), text(b"he"), 1
        ),
    )


def _of_tensors(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield files with another description of `output_norm.weight`, a vector of fp32."""
    name = text(b"output_norm.weight")
    place = whole.index(name) + len(name)
    dimensions, length, kind, offset = struct.unpack_from("<IQIQ", whole, place)

    def described(
        *, own: bytes = name, sizes: tuple[int, ...] = (length,), **changes: int
    ) -> bytes:
        values = {"count": len(sizes), "kind": kind, "offset": offset, **changes}
        made = struct.pack(f"<I{len(sizes)}Q", values["count"], *sizes)
        made += struct.pack("<IQ", values["kind"], values["offset"])
        start, end = place - len(name), place + 24
        return whole[:start] + own + made + whole[end:]

    assert dimensions == 1
    for count in (0, 2, 5, 2**32 - 1):
        yield f"{count} dimensions", described(count=count)
    for sizes in ((0,), (length - 1,), (2**63,), (2**62, 2**62), (length, 1, 1, 1)):
        yield f"the shape {sizes}", described(sizes=sizes)
    for other in (1, 2, 3, 4, 5, 12, 24, 28, 39, 40, 99, 2**32 - 1):
        yield f"the type {other}", described(kind=other)
    for other in (offset + 1, offset + 32, 2**40, 2**64 - 1):
        yield f"the offset {other}", described(offset=other)
    yield "a tensor twice", described(own=text(b"blk.0.ffn_norm.weight")[:-1] + b"t")
    yield "a name that is not UTF-8", described(own=text(b"output_norm.\xff\xfe\xfd\xfc\xfb\xfa"))
    yield "another name", described(own=text(b"output_evil.weight"))
    start = read_header(lambda at, size: whole[at : at + size], len(whole), "").start
    for name, value in (("NaN", float("nan")), ("infinity", float("-inf"))):
        number = struct.pack("<f", value)
        yield f"{name} in a vector", _written(whole, start("output_norm.weight"), number)
        experts = start("blk.0.ffn_up_exps.weight")
        yield f"{name} in the scale of a block", _written(whole, experts, struct.pack("<e", value))


def _written(whole: bytes, place: int, data: bytes) -> bytes:
    return whole[:place] + data + whole[place + len(data) :]


def varied(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield a file with each entry and each tensor missing, or replaced in many ways.

    Some of them are harmless.
    """
    entries, tensors, data = _taken_apart(whole)
    for number, (key, _) in enumerate(entries):
        before, after, name = entries[:number], entries[number + 1 :], key.decode()
        yield f"{name} is missing", _joined([*before, *after], tensors, data)
        for label, value in _VALUES.items():
            yield f"{name} is {label}", _joined([*before, (key, value), *after], tensors, data)
    for number, (name, sizes, kind, offset) in enumerate(tensors):
        before, after, label = tensors[:number], tensors[number + 1 :], name.decode()
        yield f"{label} is missing", _joined(entries, [*before, *after], data)
        others = {
            "turned": (name, sizes[::-1], kind, offset),
            "a stack": (name, (*sizes, 1), kind, offset),
            "flat": (name, (sizes[0] * sizes[-1],), kind, offset),
            "empty": (name, (0, *sizes[1:]), kind, offset),
            "one number": (name, (), 0, offset),
            "long": (name, (2**39, *sizes[1:]), kind, offset),
            "F16": (name, sizes, 1, offset),
            "IQ1_M": (name, sizes, 29, offset),
            "whole numbers": (name, sizes, 26, offset),
            "at the beginning": (name, sizes, kind, 0),
        }
        for fault, other in others.items():
            yield f"{label} is {fault}", _joined(entries, [*before, other, *after], data)


_VALUES = {
    "0": struct.pack("<IB", _U8, 0),
    "2**32 - 1": struct.pack("<II", _U32, 2**32 - 1),
    "-1": struct.pack("<Ii", 5, -1),
    "2**64 - 1": struct.pack("<IQ", 10, 2**64 - 1),
    "true": struct.pack("<IB", 7, 1),
    "a truth of 255": struct.pack("<IB", 7, 255),
    "NaN": struct.pack("<If", _F32, float("nan")),
    "infinity": struct.pack("<Id", 12, float("inf")),
    "no text": struct.pack("<I", _TEXT) + text(b""),
    "a long text": struct.pack("<I", _TEXT) + text(b"{" * 100_000),
    "a text of controls": struct.pack("<I", _TEXT) + text(b"\x1b[31m\0\n\xe2\x80\xae{% raw"),
    "an empty list": struct.pack("<IIQ", _LIST, _U8, 0),
    "a list of texts": struct.pack("<IIQ", _LIST, _TEXT, 3) + text(b"") * 2 + text(b"a b c"),
    "a list of numbers": struct.pack("<IIQ3i", _LIST, 5, 3, -1, 2**31 - 1, 1),
    "a list of NaN": struct.pack("<IIQf", _LIST, _F32, 1, float("nan")),
}
_Entries = list[tuple[bytes, bytes]]  # keys, and values with their types
_Tensors = list[tuple[bytes, tuple[int, ...], int, int]]  # names, sizes, types and offsets


def _taken_apart(whole: bytes) -> tuple[_Entries, _Tensors, bytes]:
    """Return the metadata, the descriptions of tensors, and their bytes."""
    tensors, entries = struct.unpack_from("<QQ", whole, 8)
    found, described, place = [], [], 24
    for _ in range(entries):
        key, place = _text_at(whole, place)
        start = place
        place = _end_of(whole, place + 4, *struct.unpack_from("<I", whole, place))
        found.append((key, whole[start:place]))
    for _ in range(tensors):
        name, place = _text_at(whole, place)
        (count,) = struct.unpack_from("<I", whole, place)
        *sizes, kind, offset = struct.unpack_from(f"<{count}QIQ", whole, place + 4)
        described.append((name, tuple(sizes), kind, offset))
        place += 16 + 8 * count
    return found, described, whole[place + -place % 32 :]


def _joined(entries: _Entries, tensors: _Tensors, data: bytes) -> bytes:
    made = header(len(tensors), len(entries), b"".join(text(k) + value for k, value in entries))
    for name, sizes, kind, offset in tensors:
        shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        made += text(name) + shape + struct.pack("<IQ", kind, offset)
    return made + bytes(-len(made) % 32) + data


def _text_at(whole: bytes, place: int) -> tuple[bytes, int]:
    end = place + 8 + struct.unpack_from("<Q", whole, place)[0]
    return whole[place + 8 : end], end


def _end_of(whole: bytes, place: int, kind: int) -> int:
    """Return the end of a value of this type, which begins at `place`."""
    if kind == _TEXT:
        return _text_at(whole, place)[1]
    if kind != _LIST:
        return place + _SIZES[kind]
    inner, count = struct.unpack_from("<IQ", whole, place)
    place += 12
    if inner != _TEXT:
        return place + count * _SIZES[inner]
    for _ in range(count):
        place = _text_at(whole, place)[1]
    return place
