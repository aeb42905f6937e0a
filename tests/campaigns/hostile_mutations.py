"""Thousands of mutated shards and installed models: each opens, or is refused in one line."""

import hashlib
import json
import os
import random
import resource
import shutil
import struct
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rig
from hostile import LINE, Found

BATCH = 250
VALUES: tuple[Any, ...] = (
    -1, 0, 1, 2**31 - 1, 2**63, 10**300, 1e308, float("nan"), None, True, "", "..", "a\0b",
    "\ud800", [], {}, [[]], "x" * 1000, [1, 2], {"a": 1}, "BF16", 1.5,
)  # fmt: skip


def campaign(work: Path, found: Found, options: Namespace) -> None:
    """Run all, in children of some hundred each."""
    shape = {**rig.TINY, "vocab_size": 32000, "hidden_size": 64}
    source = rig.make_checkpoint(work / "source", 4, 150_000, **rig.TINY)
    spoken = rig.make_checkpoint(work / "spoken", 4, 1 << 40, **shape)
    for path in (source, spoken):
        code = rig.wait(rig.fork(rig.mixchat("download", str(path), "--name", path.name)))
        assert code == 0
    models = Path(os.environ["MIXCHAT_HOME"]) / "models"
    batches(work, found, options, lambda _, chance: _one(chance, work, source, models, spoken))


def batches(
    work: Path, found: Found, options: Namespace, one: Callable[[int, random.Random], list[Any]]
) -> None:
    """Let `one` try a mutation by each number and its seed, and record what it returns."""
    for first in range(0, options.mutations, BATCH):
        report, output = work / "report", work / "out"
        report.write_text("")
        last = min(first + BATCH, options.mutations)

        def batch(first: int = first, last: int = last, report: Path = report) -> None:
            resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
            with open(report, "a", buffering=1) as lines:
                for number in range(first, last):
                    print(json.dumps(["begun", number]), file=lines)
                    chance = random.Random(f"{options.seed} {number}")
                    began = time.monotonic()
                    outcome = [*one(number, chance), time.monotonic() - began]
                    print(json.dumps([number, *outcome]), file=lines)
                usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                print(json.dumps(["memory", usage]), file=lines)

        code = rig.wait(rig.fork(batch, output), 300)
        _collect([json.loads(line) for line in report.read_text().splitlines()], found)
        if code != 0:
            text = report.read_text().splitlines()[-1:]
            found.failures.append(f"batch {first}: exit {code} after {text}: {output.read_text()}")


def _collect(lines: list[list[Any]], found: Found) -> None:
    for line in lines:
        if line[0] == "begun":
            continue
        if line[0] == "memory":
            found.memory = max(found.memory, line[1])
            if line[1] > 1_500_000_000:
                found.failures.append(f"took {line[1]:,} bytes of memory")
            continue
        number, target, kind, outcome, problem, seconds = line
        found.counts[f"{target}, {outcome}"] += 1
        if problem:
            found.failures.append(f"mutation {number} ({target}, {kind}): {problem}")
        if seconds > 10:
            found.failures.append(f"mutation {number} ({target}, {kind}): {seconds:.0f} s")


def _one(chance: random.Random, work: Path, source: Path, models: Path, spoken: Path) -> list[Any]:
    """One mutation: what was mutated and how, what came of it, and what is wrong with that."""
    from mixchat.base.errors import MixchatError

    local = chance.random() < 0.5
    checkpoint = source if local else models / ("spoken" if chance.random() < 0.02 else "source")
    copy = work / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint, copy, copy_function=os.link)
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != "tokenizer.model")
    name = "tokenizer.model" if checkpoint.name == "spoken" else chance.choice(names)
    kind, data = _mutated(chance, name, (checkpoint / name).read_bytes())
    (copy / name).unlink()
    (copy / name).write_bytes(data)
    what = name.split("-")[0]
    try:
        outcome = (_open_source if local else _open_installed)(copy, chance, name)
    except MixchatError as error:
        text = str(error)
        fine = len(text) < LINE and text.isprintable()
        return [what, kind, "refused", None if fine else f"{len(text)}: {text!r:.300}"]
    except Exception:
        return [what, kind, "CRASHED", traceback.format_exc()[-700:]]
    return [what, kind, outcome, None]


def _mutated(chance: random.Random, name: str, data: bytes) -> tuple[str, bytes]:
    """Another content, and what was done."""
    kinds = ["flip", "flip", "cut", "insert", "delete", "repeat", "zeros"]
    kind = chance.choice(kinds + ["edit"] * (7 if name.endswith((".json", ".safetensors")) else 0))
    place, count = chance.randrange(len(data)), chance.choice((1, 2, 8, 100, 4096))
    if name.endswith(".safetensors") and chance.random() < 0.6:
        place = chance.randrange(8 + struct.unpack("<Q", data[:8])[0])
    if kind == "edit":
        return kind, _edited(chance, name, data)
    if kind == "flip":
        changed = bytearray(data)
        for _ in range(min(count, 16)):
            changed[(place + chance.randrange(64)) % len(data)] = chance.randrange(256)
        return kind, bytes(changed)
    middle = {
        "cut": b"",
        "insert": chance.randbytes(count) + data[place:],
        "delete": data[place + count :],
        "repeat": data[place : place + count] + data[place:],
        "zeros": bytes(min(count, len(data) - place)) + data[place + count :],
    }
    return kind, data[:place] + middle[kind]


def _edited(chance: random.Random, name: str, data: bytes) -> bytes:
    """A value of the JSON, anywhere in it, is another one, or a key is gone or renamed."""
    shard, rest = name.endswith(".safetensors"), b""
    if shard:
        length = struct.unpack("<Q", data[:8])[0]
        data, rest = data[8 : 8 + length], data[8 + length :]
    raw = json.loads(data)
    node = raw
    while True:
        key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list) or not node[key] or chance.random() < 0.25:
            break
        node = node[key]
    if isinstance(node, dict) and chance.random() < 0.3:
        value = node.pop(key)
        if chance.random() < 0.5:
            node[str(chance.choice(VALUES))] = value
    else:
        node[key] = chance.choice(VALUES)
    if name.startswith("mixchat") and raw.pop("sha256", None):
        text = json.dumps(raw, sort_keys=True, separators=(",", ":"))
        raw["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    text = json.dumps(raw).encode()
    return struct.pack("<Q", len(text)) + text + rest if shard else text


def _open_source(copy: Path, chance: random.Random, name: str) -> str:
    from mixchat.install.make.from_checkpoint import CheckpointBuild
    from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
    from mixchat.install.source.checkpoint import CheckpointReader, DirectoryCheckpoint
    from mixchat.weights.format.manifest import Source

    checkpoint = DirectoryCheckpoint(copy, Source(str(copy)))
    blueprint = make_blueprint(checkpoint.index, QuantizeOptions())
    if chance.random() < 0.1:
        target = copy.with_name("target")
        shutil.rmtree(target, ignore_errors=True)
        CheckpointBuild(checkpoint, target, blueprint).run()
        return "built"
    from mixchat.install.source.checkpoint_index import expected_shapes

    with CheckpointReader(checkpoint) as readers:
        for tensor in expected_shapes(checkpoint.index.config):
            checkpoint.index.read_dense(tensor, readers.read)
    return "read"


def _open_installed(copy: Path, chance: random.Random, name: str) -> str:
    import torch

    from mixchat.base.progress import NoProgress
    from mixchat.install import models
    from mixchat.install.care.repair import verify
    from mixchat.text.checkpoint_text import check_text
    from mixchat.weights.format.installed_model import InstalledModel

    models.describe(copy)
    damages = chance.random() < 0.5 and verify(copy, NoProgress())
    with InstalledModel(copy) as model:
        for spec in model.blueprint.shared_tensors():
            model.tensor(spec)
        block = torch.empty(model.blueprint.expert.stride, dtype=torch.uint8)
        for layer in range(model.config.num_hidden_layers):
            model.read_expert(layer, model.config.num_local_experts - 1, block)
    if name == "tokenizer.model":
        check_text(copy)
    return f"opened{', though verify finds it' if damages else ''}"
