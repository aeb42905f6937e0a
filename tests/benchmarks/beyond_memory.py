"""A Mixtral larger than memory: tokens a second, beside the disk's limit and beside llama.cpp.

    python tests/benchmarks/beyond_memory.py WORK [--free GIB ...] [--host-memory SIZE ...]
        [--expert-bits 4 ...] [--layers 32] [--shape instruct] [--dense-bits 8] [--tokens 48]
        [--rounds 2] [--depth N] [--peer PYTHON MODEL.gguf] [--keep]

WORK gets a model with Mixtral's real layer shapes and random weights for each count of bits (0.79
GB a layer with experts in 4, 0.67 in 3), which are deleted afterwards. 2.5 or 14GB makes a mix.
--shape takes another known model's shapes. For each count of GiB in --free another process holds
what is free beyond that. Every figure comes from a process of its own, one after the other, in
rounds, so that what else the machine does strikes all alike.

The limit is what a token takes where nothing waits: the longer of reading its bytes at the disk's
bandwidth and of computing it at the speeds that the round's calibration found. Some disks are twice
as fast in one minute as in the next: the bandwidth is the one that the tokens' own reads had; right
after it is measured with nothing beside it, too. The prediction is what `mixchat plan` makes of the
calibration; another one is made with the bandwidth that the reads had. --peer runs
`peer_child.py bench` with that Python.

Random weights make routers that choose evenly, and hidden states that change little from layer to
layer, so that predictions are right more often than with real weights; `--depth 0` makes none.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from mixchat.base import machine
from mixchat.engine.environment import prepare_environment

if TYPE_CHECKING:
    from mixchat.planning.machine_speeds import MachineSpeeds

GIB = 2**30
PEER = Path(__file__).with_name("peer_child.py")
PROMPT = 12  # tokens
SKIPPED = 8  # of the answer: the cache settles


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--expert-bits", nargs="*", default=["4"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shape", default="instruct")
    parser.add_argument("--dense-bits", default="8")
    parser.add_argument("--free", type=float, nargs="*", default=[])
    parser.add_argument("--host-memory", nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--peer", nargs=2)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--calibrate", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tokens <= SKIPPED + 1:
        parser.error(f"--tokens: at least {SKIPPED + 2}")
    if given.calibrate:
        calibrate(given.calibrate)
        return
    if given.one:
        print(json.dumps(answer(Path(given.one[0]), given.one[1], given.tokens, given.depth)))
        return
    os.environ["MIXCHAT_HOME"] = str(given.work)
    form = f"{given.shape}-{given.layers}"
    models = {bits: given.work / f"{form}-{bits}" for bits in given.expert_bits}
    for bits, model in models.items():
        if not model.exists():
            command = [sys.executable, "-m", "mixchat.bench.synthetic", str(model)]
            run([*command, str(given.layers), bits, given.shape, given.dense_bits])
    try:
        for number in range(given.rounds):
            for free in given.free or [None]:
                with ballast(free):
                    one_round(number, models, free, given)
    finally:
        if not given.keep:
            for model in models.values():
                shutil.rmtree(model)


def one_round(
    number: int, models: dict[str, Path], free: float | None, given: argparse.Namespace
) -> None:
    """Measure each model with each budget once, and the peer once, with so many GiB free."""
    where = f"round {number + 1}, {machine.free_memory() / GIB:.1f} GiB free"
    more = ["--tokens", str(given.tokens)]
    (given.work / "machine.json").unlink(missing_ok=True)
    if given.depth is not None:
        more += ["--depth", str(given.depth)]
    for bits, model in models.items():
        run([sys.executable, __file__, "-", "--calibrate", str(model)])
        for budget in given.host_memory or ["auto"]:
            done = run([sys.executable, __file__, "-", "--one", str(model), budget, *more])
            print(f"{where}, {bits} bits, {budget}: {described(json.loads(done))}", flush=True)
    if given.peer:
        python, gguf = given.peer
        command = [python, str(PEER), "bench", gguf, str(PROMPT), str(given.tokens)]
        print(f"{where}, {run(command)}", end="")


def described(figures: dict[str, float]) -> str:
    """Return the figures of an answer as a line."""
    reading = figures["bytes"] / figures["read_rate"]
    limit = 1 / max(reading, figures["computing"])
    parts = (
        f"{figures['slots']} slots, {figures['rate']:.2f} tok/s (median {figures['median']:.2f})",
        f"predicted {figures['predicted']:.2f}, "
        f"with the disk as it was then {figures['predicted_meanwhile']:.2f}",
        f"limit {limit:.2f}, reached {figures['rate'] / limit:.0%}",
        f"computing {figures['computing']:.2f} s, reading {reading:.2f} s: "
        f"{figures['bytes'] / 1e9:.2f} GB at {figures['read_rate'] / 1e9:.2f} GB/s "
        f"({figures['disk_before'] / 1e9:.2f} before, {figures['disk'] / 1e9:.2f} afterwards), "
        f"the disk busy {figures['busy']:.0%}",
        f"hits {figures['hit_rate']:.1%}, expected {figures['expected_hit_rate']:.1%}",
        f"waited {figures['stalled']:.0%}",
        f"memory {figures['memory'] / 1e9:.1f} GB, planned {figures['memory_planned'] / 1e9:.1f}",
        f"{figures['right']} of {figures['predictions']} predicted, depth {figures['depth']}",
        f"first token after {figures['first']:.1f} s, {figures['first_bytes'] / 1e9:.1f} GB",
    )
    return "; ".join(parts)


def answer(model: Path, budget: str, tokens: int, depth: int | None) -> dict[str, object]:
    """Load the model and let it answer; return what that took."""
    began = time.time()  # beside the start of the interpreter and of this file's imports
    prepare_environment()
    import torch

    from mixchat.base.options import LoadOptions, SamplingOptions
    from mixchat.base.quantities import MemoryBudget
    from mixchat.experts.memory import CPU
    from mixchat.experts.placement import Placement
    from mixchat.loading import tiers
    from mixchat.loading.loader import load_engine
    from mixchat.planning.disk_speed import measure_disk
    from mixchat.planning.expectation import SpeedEstimate
    from mixchat.planning.measuring import saved_speeds
    from mixchat.weights.format.installed_model import InstalledModel

    if depth is not None:
        tiers.LAYERS_AHEAD = depth
    host_memory = None if budget == "auto" else MemoryBudget.parse(budget)
    options = LoadOptions(host_memory=host_memory, device="cpu", speculation=False)
    before_loading = resident_bytes()
    engine = load_engine(model, options)
    prompt = torch.randint(5, 32000, (PROMPT,), generator=torch.Generator().manual_seed(0))
    sampling = SamplingOptions(temperature=1, seed=0)
    ids = engine.generate(prompt.tolist(), sampling=sampling, stop_ids=set(), max_tokens=tokens)
    next(ids)
    first, first_bytes = time.time() - began, engine.experts.stats.bytes_moved
    for _ in range(SKIPPED):
        next(ids)
    before, start, seconds = engine.experts.stats, time.perf_counter(), []
    for _ in ids:
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    did, total = engine.experts.stats.since(before), sum(seconds)
    memory = resident_bytes() - before_loading
    with InstalledModel(model) as installed:
        blueprint = installed.blueprint
    placement = Placement(engine.experts.slots, 0, blueprint.expert_count)
    saved = saved_speeds(blueprint, model, CPU)
    assert saved is not None
    expected = SpeedEstimate(blueprint, CPU, saved, placement)
    stride = blueprint.expert.stride
    disk = measure_disk(model, stride, max(6 * stride, 512 << 20), lambda: None, 0.4)
    # Nothing is read where all experts had come before.
    read_rate = did.bytes_read / did.read_seconds if did.read_seconds else disk.idle
    meanwhile = replace(expected, speeds=with_disk(saved, read_rate))
    return {
        "slots": engine.experts.slots,
        "memory": memory,
        "memory_planned": blueprint.shared_size + engine.experts.slots * blueprint.mean_expert,
        "rate": len(seconds) / total,
        "median": 1 / median(seconds),
        "bytes": did.bytes_moved / len(seconds),
        "hit_rate": did.hit_rate,
        "stalled": did.stalled_seconds / total,
        "predictions": did.predictions,
        "right": did.right_predictions,
        "depth": engine.passes.model.blocks[-1].experts.runner._layers_ahead,
        "first": first,
        "first_bytes": first_bytes,
        "read_rate": read_rate,
        "busy": did.read_seconds / total,
        "disk": disk.idle,
        "disk_before": saved.disk_idle,
        "predicted": expected.tokens_per_second,
        "predicted_meanwhile": meanwhile.tokens_per_second,
        "computing": expected.token.computing,
        "expected_hit_rate": expected.hit_rate,
    }


def resident_bytes() -> int:
    """Return the memory that this process takes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def with_disk(measured: MachineSpeeds, bandwidth: float) -> MachineSpeeds:
    """Return the speeds as they would be if reads in use had so many bytes a second."""
    from mixchat.planning.expectation import IN_USE

    disk = bandwidth / IN_USE
    return replace(measured, disk_busy=disk, disk_idle=disk)


def calibrate(model: Path) -> None:
    """Measure the machine, as `mixchat plan` does."""
    prepare_environment()
    from mixchat.experts.memory import CPU
    from mixchat.planning.measuring import measure_machine
    from mixchat.planning.torch_threads import choose_threads
    from mixchat.weights.format.installed_model import InstalledModel

    with InstalledModel(model) as installed:
        choose_threads(installed.blueprint)
        measure_machine(installed.blueprint, model, CPU)


@contextmanager
def ballast(free: float | None) -> Iterator[None]:
    """Hold memory until only `free` GiB are left."""
    size = 0 if free is None else int(machine.free_memory() - free * GIB)
    if size <= 0:
        yield
        return
    held = f"b = bytearray({size}); b[::4096] = b'x' * len(b[::4096])"
    code = f"import sys; {held}; print(flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        process.stdout.readline()
        yield
    finally:
        process.stdin.close()
        process.wait()


def run(command: list[str]) -> str:
    """Return what a command prints; show what it prints on standard error only if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
