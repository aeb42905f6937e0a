"""Measures `mixchat download` on Mixtral's real layer shapes: time, peak memory, peak disk.

    python tests/benchmarks/download.py WORK [--layers 4] [--peer LLAMA_CPP_DIRECTORY]

It writes a random checkpoint in bf16 below the directory WORK (2.9 GB a layer, 12 GB for four),
serves it on this machine, and runs the command against it. LLAMA_CPP_DIRECTORY holds
llama.cpp's convert_hf_to_gguf.py and a built llama-quantize: then its two steps run on the same
files. All is removed at the end but for the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from fake_hub import REPO, FakeHub

from mixchat.base.machine import disk_usage
from mixchat.base.model_config import ModelConfig
from mixchat.base.quantities import format_size
from mixchat.base.safetensors import SafetensorsWriter, TensorSpec
from mixchat.install.known_models import KNOWN
from mixchat.install.source.checkpoint_index import INDEX, expected_shapes
from mixchat.weights.families.read_config import read_config

SHARD = 4_900_000_000  # bytes, about as the real one has them
NOISE = 200_000_000  # weights; slices of it are the matrices


def write_checkpoint(directory: Path, layers: int) -> None:
    """A checkpoint of random weights in bf16, with Mixtral's own tokenizer."""
    import mistral_common

    directory.mkdir(parents=True)
    config = {**KNOWN["instruct"].config, "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    config["architectures"] = ["MixtralForCausalLM"]
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(tokenizer, directory / "tokenizer.model")
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0))
    noise = noise.mul_(0.02).to(torch.bfloat16)
    weight_map, start = {}, 0
    shards = list(_shards(read_config(config)))
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(directory / name, shard) as writer:
            for spec in shard:
                count = torch.Size(spec.shape).numel()
                start = (start + 791_931) % (NOISE - count)
                writer.write(spec.name, noise[start : start + count].view(spec.shape))
                weight_map[spec.name] = name
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _shards(config: ModelConfig) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    for name, shape in expected_shapes(config).items():
        spec = TensorSpec(name, torch.bfloat16, shape)
        if sum(one.nbytes for one in shard) + spec.nbytes > SHARD:
            yield shard
            shard = []
        shard.append(spec)
    yield shard


def serve(checkpoint: Path) -> FakeHub:
    """A hub with these files, which stay on disk."""
    files = {}
    for path in sorted(checkpoint.iterdir()):
        with open(path, "rb") as file:
            files[path.name] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    hub = FakeHub(files, step=1 << 20)
    for name in files:
        hub.hashes(name)
    return hub


class Watch:
    """The most memory that a process took, and disk below a directory: looked at all the time."""

    def __init__(self, directory: Path) -> None:
        self.memory = self.disk = self.process = 0
        self._directory = directory
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._stop.wait(0.1):
            self.disk = max(self.disk, disk_usage(self._directory))
            # Not wait4's ru_maxrss: that begins with what the forking process had.
            with suppress(OSError, StopIteration):
                lines = Path(f"/proc/{self.process}/status").read_text().splitlines()
                peak = next(line for line in lines if line.startswith("VmHWM:"))
                self.memory = max(self.memory, int(peak.split()[1]) * 1024)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(what: str, directory: Path, *steps: list[str], **environment: str) -> None:
    """Run commands one after the other; print their time together, peak memory and peak disk."""
    began = time.monotonic()
    with Watch(directory) as watch:
        for step in steps:
            process = subprocess.Popen(
                step, env={**os.environ, **environment}, stdout=subprocess.DEVNULL
            )
            watch.process = process.pid
            if process.wait():
                raise SystemExit(f"{what}: {step[0]} failed")
    print(
        f"{what:20} {time.monotonic() - began:6.0f} s   memory {format_size(watch.memory):>8}   "
        f"disk {format_size(watch.disk):>8}   installed {format_size(disk_usage(directory)):>8}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--peer", type=Path, metavar="LLAMA_CPP_DIRECTORY")
    arguments = parser.parse_args()
    work, checkpoint = arguments.work, arguments.work / f"checkpoint-{arguments.layers}"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, arguments.layers)
    print(f"checkpoint: {format_size(disk_usage(checkpoint))}")
    mixchat = [sys.executable, "-m", "mixchat", "download"]
    for what, source in (("mixchat, from disk", str(checkpoint)), ("mixchat, from a hub", REPO)):
        home = work / "home"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        with serve(checkpoint) as hub:
            variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "NO_PROXY": "*"}
            name = ["--name", "real"] if source != REPO else []
            measure(what, home, [*mixchat, source, *name], MIXCHAT_HOME=str(home), **variables)
        shutil.rmtree(home)
    if arguments.peer:
        peer(arguments.peer, checkpoint, work / "peer")


def peer(llama_cpp: Path, checkpoint: Path, directory: Path) -> None:
    """llama.cpp's way: everything into one GGUF in bf16, and that into Q4_0."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    whole, small = directory / "bf16.gguf", directory / "q4_0.gguf"
    convert = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(checkpoint)]
    quantize = [str(llama_cpp / "llama-quantize"), str(whole), str(small), "Q4_0"]
    measure(
        "llama.cpp",
        directory,
        [*convert, "--outtype", "bf16", "--outfile", str(whole)],
        [*quantize, str(os.cpu_count())],
    )
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
