"""The first token of a cold start, beside the disk, the plan and llama.cpp.

    python tests/benchmarks/cold_start.py MODEL [--free GIB] [--host-memory SIZE] [--rounds 2]
        [--tokens 24] [--peer PYTHON FILE.gguf]

MODEL is the directory of an installed model, such as `python -m mixchat.bench.synthetic` writes.
Each round measures the machine (`mixchat plan --measure`), then a start with nothing of the model
in the page cache, a later prompt and tokens after it (`mixchat bench`), and then the same of
llama.cpp (`peer_child.py bench`). With --free another process holds what is free beyond that.

"The disk alone" is the time in which eight threads read as many bytes right after the start, into
memory that was used before. mixchat's seconds count from the start of Python, llama.cpp's from the
moment in which its imports are done.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from beyond_memory import PEER, PROMPT, ballast, run

from mixchat.base import system
from mixchat.planning.disk_speed import DiskRates, measure_disk
from mixchat.weights.format.installed_model import InstalledModel

_DISK_S = 0.25  # for a figure of the disk


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--free", type=float)
    parser.add_argument("--host-memory")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--peer", nargs=2, metavar=("PYTHON", "GGUF"))
    options = parser.parse_args()
    flags = ["--device", "cpu", "--json"]
    if options.host_memory:
        flags += ["--host-memory", options.host_memory]
    for _ in range(options.rounds):
        with ballast(options.free):
            plan = mixchat("plan", options.model, *flags, "--measure")
            task = ("--prompt", str(PROMPT), "--tokens", str(options.tokens), "--rounds", "1")
            bench = mixchat("bench", options.model, *flags, *task)
            with InstalledModel(options.model) as installed:
                expert = installed.blueprint.expert.stride
            disk = measure_disk(options.model, expert, 0, lambda: None, _DISK_S)
            assert disk is not None
            print(described(plan, bench, disk), flush=True)
            if options.peer:
                python, gguf = options.peer
                drop_pages(Path(gguf))
                print(
                    run(
                        [
                            python,
                            str(PEER),
                            "bench",
                            gguf,
                            str(PROMPT),
                            str(max(options.tokens, 10)),
                        ]
                    ),
                    end="",
                    flush=True,
                )


def mixchat(command: str, model: Path, *flags: str) -> dict:
    """Return the JSON of a command about a model."""
    return json.loads(run([sys.executable, "-m", "mixchat", command, str(model), *flags]))


def described(plan: dict, bench: dict, disk: DiskRates) -> str:
    """Return a plan and what came as a line."""
    cold, warm, planned = bench["cold"], bench["warm"], plan["prompts"][0]["seconds"]
    size = cold["shared"] + cold["prompt"]["bytes_read"]
    alone, decode = size / disk.idle, bench["tasks"][0]["mixchat"][0]
    parts = (
        f"{size / 1e9:.2f} GB, the disk alone {alone:.1f} s at {disk.idle / 1e9:.2f} GB/s",
        f"cold {cold['seconds']:.1f} s ({cold['starting']:.1f} starting, {cold['loading']:.1f} "
        f"loading, {cold['prompt']['waiting']:.1f} waiting of {cold['prompt']['seconds']:.1f})",
        f"1.3 times that and 1.5 s: {1.3 * alone + 1.5:.1f} s",
        f"warm {warm['seconds']:.2f} s, planned {planned:.2f}",
        f"decoding {decode:.2f} tok/s, planned {plan['tokens_per_second']:.2f}",
    )
    return "; ".join(parts)


def drop_pages(path: Path) -> None:
    """Let the page cache forget a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        system.advise(file.fileno(), 0, 0, needed=False)


if __name__ == "__main__":
    main()
