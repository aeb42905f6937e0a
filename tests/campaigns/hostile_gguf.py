"""Malformed and mutated GGUF files, here and on the hub: each is refused with one line."""

from __future__ import annotations

import os
import random
import shutil
import traceback
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import rig
from counted_hub import Hub
from hostile import LINE, Found, judged
from hostile_mutations import batches

NAME = "tiny-Q8_0.gguf"


def campaign(work: Path, found: Found, options: Namespace) -> None:
    """Try malformed files here and on the hub, then read `varied` ones and mutations.

    The latter may be read, if what they have is harmless.
    """
    import gguf_files
    from malformed_gguf import malformed, varied

    shape = {**rig.TINY, "vocab_size": 262, "num_hidden_layers": 1}
    checkpoint = rig.make_checkpoint(work / "checkpoint", 1, 1 << 40, **shape)
    source = work / "bad"
    whole = gguf_files.write(checkpoint, source / NAME, "Q8_0").read_bytes()
    with Hub(source) as hub:
        for label, data in (("whole", whole), *malformed(whole)):
            for code in _downloaded({NAME: data}, source, hub, work, label, found):
                if (code == 0) != (label == "whole"):
                    found.failures.append(f"{label}: exit {code}")
        for label, files in _parted(gguf_files, checkpoint, work / "parts"):
            for code in _downloaded(files, source, hub, work, label, found):
                if (code == 0) != label.startswith("whole"):
                    found.failures.append(f"{label}: exit {code}")

    others = [*varied(whole)]

    def one(number: int, chance: random.Random) -> list[object]:
        data = others[number][1] if number < len(others) else _mutated(chance, whole)
        kind = others[number][0] if number < len(others) else "bytes"
        return _opened(work / "mutated.gguf", data, kind)

    batches(work, found, options, one)


def _downloaded(
    files: dict[str, bytes], source: Path, hub: Hub, work: Path, label: str, found: Found
) -> list[int | None]:
    """Install a model of these files from here and from the hub, and return the exit codes."""
    shutil.rmtree(source)
    source.mkdir()
    for name, data in files.items():
        (source / name).write_bytes(data)
    hub.set(directory=str(source))
    codes = []
    for where, model in (("here", str(source / min(files))), ("on the hub", rig.REPO)):
        for variable in ("MIXCHAT_HOME", "HF_HOME"):
            shutil.rmtree(os.environ[variable], ignore_errors=True)
        work_done = rig.mixchat("download", model, "--name", "it")
        codes.append(judged(work_done, work / "out", f"{label}, {where}", found))
        found.counts[f"{where}: {'refused' if codes[-1] else 'taken'}"] += 1
    return codes


def _parted(
    gguf_files: ModuleType, checkpoint: Path, directory: Path
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the parts of a model, by what is wrong with them."""
    gguf_files.write(checkpoint, directory / "tiny-Q8_0.gguf", "Q8_0", parts=3)
    first, second, third = ((path.name, path.read_bytes()) for path in sorted(directory.iterdir()))
    parts = dict((first, second, third))
    yield "whole, in parts", parts
    yield "the second part missing", dict((first, third))
    yield "the second part empty", {**parts, second[0]: b""}
    yield "the second part twice", {**parts, third[0]: second[1]}
    yield "the first part three times", dict.fromkeys(parts, first[1])
    yield "the parts in another order", {first[0]: second[1], second[0]: first[1]} | dict((third,))
    yield "the second part cut short", {**parts, second[0]: second[1][:-40]}
    yield "a part 0", {"tiny-Q8_0-00000-of-00003.gguf": first[1], **parts}
    yield "one part of 99,999", {"tiny-Q8_0-00001-of-99999.gguf": first[1]}
    yield "one part of none", {"tiny-Q8_0-00001-of-00000.gguf": first[1]}


def _mutated(chance: random.Random, whole: bytes) -> bytes:
    data = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(min(len(data), 12_000 if chance.random() < 0.9 else len(data)))
        data[place : place + chance.choice((0, 1, 1, 4, 8))] = chance.randbytes(
            chance.choice((0, 1, 1, 4, 8))
        )
    return bytes(data)


def _opened(path: Path, data: bytes, kind: str) -> list[object]:
    """Read all of a file of these bytes, and return what came of it."""
    from mixchat.base.errors import MixchatError
    from mixchat.base.progress import NoProgress
    from mixchat.install.source.checkpoint import CheckpointReader
    from mixchat.install.source.open_checkpoint import open_checkpoint
    from mixchat.weights.format.manifest import Source

    path.write_bytes(data)
    what = "mutation" if kind == "bytes" else "variation"
    try:
        with (
            open_checkpoint(Source(str(path)), path.parent / "target", NoProgress()) as checkpoint,
            CheckpointReader(checkpoint) as reader,
        ):
            checkpoint.companions()
            for spec in checkpoint.index.header(path.name).specs:
                checkpoint.index.read_dense(spec.name, reader.read)
    except MixchatError as error:
        text = str(error)
        fine = len(text) < LINE and text.isprintable()
        return [what, kind, "refused", None if fine else f"{len(text)}: {text!r:.300}"]
    except Exception:
        return [what, kind, "CRASHED", traceback.format_exc()[-700:]]
    return [what, kind, "read", None]
