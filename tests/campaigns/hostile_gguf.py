"""Malformed and mutated GGUF files, here and on the hub: each is refused with one line."""

from __future__ import annotations

import os
import random
import shutil
import traceback
from argparse import Namespace
from pathlib import Path

import rig
from counted_hub import Hub
from hostile import LINE, Found, judged
from hostile_mutations import batches

NAME = "tiny-Q8_0.gguf"


def campaign(work: Path, found: Found, options: Namespace) -> None:
    """Try every malformed file as a local one and on the hub, then mutations of a whole one."""
    import gguf_files
    from malformed_gguf import malformed

    shape = {**rig.TINY, "vocab_size": 262, "num_hidden_layers": 1}
    checkpoint = rig.make_checkpoint(work / "checkpoint", 1, 1 << 40, **shape)
    source = work / "bad"
    whole = gguf_files.write(checkpoint, source / NAME, "Q8_0").read_bytes()
    hub = Hub(source)
    try:
        for label, data in (("whole", whole), *malformed(whole)):
            (source / NAME).write_bytes(data)
            hub.set(directory=str(source))
            for where, model in (("here", str(source / NAME)), ("on the hub", rig.REPO)):
                for variable in ("MIXCHAT_HOME", "HF_HOME"):
                    shutil.rmtree(os.environ[variable], ignore_errors=True)
                code = judged(
                    rig.mixchat("download", model), work / "out", f"{label}, {where}", found
                )
                found.counts[f"{where}: {'refused' if code else 'taken'}"] += 1
                if (code == 0) != (label == "whole"):
                    found.failures.append(f"{label}, {where}: exit {code}")
    finally:
        hub.close()

    def one(chance: random.Random) -> list[object]:
        return _mutated(chance, work / "mutated.gguf", whole)

    batches(work, found, options, one)


def _mutated(chance: random.Random, path: Path, whole: bytes) -> list[object]:
    """Read a mutation of a file, and return what came of it."""
    from mixchat.base.errors import MixchatError
    from mixchat.base.progress import NoProgress
    from mixchat.weights.format.manifest import Source
    from mixchat.weights.source.checkpoint import CheckpointReader
    from mixchat.weights.source.open_checkpoint import open_checkpoint

    data = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(min(len(data), 12_000 if chance.random() < 0.9 else len(data)))
        data[place : place + chance.choice((0, 1, 1, 4, 8))] = chance.randbytes(
            chance.choice((0, 1, 1, 4, 8))
        )
    path.write_bytes(data)
    try:
        with (
            open_checkpoint(Source(str(path)), path.parent / "target", NoProgress()) as checkpoint,
            CheckpointReader(checkpoint) as reader,
        ):
            for spec in checkpoint.index.header(path.name).specs:
                checkpoint.index.read_dense(spec.name, reader.read)
    except MixchatError as error:
        text = str(error)
        fine = len(text) < LINE and text.isprintable()
        return ["gguf", "bytes", "refused", None if fine else f"{len(text)}: {text!r:.300}"]
    except Exception:
        return ["gguf", "bytes", "CRASHED", traceback.format_exc()[-700:]]
    return ["gguf", "bytes", "read", None]
