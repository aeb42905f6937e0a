"""Experts on other machines: tokens a second of `mixchat bench` with workers and without.

    python tests/benchmarks/workers.py WORK [--layers 16] [--workers 1 2 3] [--links 1:0.2 ...]
        [--rounds 3] [--tokens 24] [--prompt 512] [--keep]

WORK gets a model with Mixtral's real layer shapes and random weights (0.79 GB a layer), one copy
for all, which is deleted afterwards, and `workers.json` with every figure. A link of `1:0.2` has
1 Gb/s and a round trip of 0.2 ms; see `network.py`, which says what it needs.

Each round measures one machine whose memory holds half of the experts (the others come from its
disk), one that holds all, and, for each link, one with half and workers that hold the other half.
Each machine has a network namespace, one thread, and a control group that limits its memory with
its page cache. The machine that chats has core 0; a single worker has core 1, and more share all.

At batch 1 no more than two machines compute at once, so that two cores are enough for any number of
workers; a prompt keeps all of them busy, and wants a core for each. All share this machine's memory
bandwidth, which machines of their own would not. So the ideal, against which decoding is measured,
has the time of an expert while another core computes one as well: see `ideal`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

from machines import CHAT, MODEL, WORKERS, Rig
from network import Link, Network, network, start

from mixchat.engine.environment import prepare_environment
from mixchat.weights.format.installed_model import InstalledModel

CHOSEN = 2  # experts a token


@dataclass(frozen=True)
class Timing:
    """Seconds of an expert for one row: `alone`, and `beside` a core that computes one as well."""

    alone: float
    beside: float


def expert_timing() -> Timing:
    """Measure an expert with one thread, on one core and on two at once."""
    alone, beside = _expert_seconds([0]), _expert_seconds([0, 1])
    return Timing(alone[0], sum(beside) / len(beside))


def _expert_seconds(cores: Sequence[int]) -> list[float]:
    """Return the seconds of an expert for one row, in a process on each of these cores at once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "-", "--expert"]
    processes = [
        start(["taskset", "-c", str(core), *command], stdout=subprocess.PIPE, env=environment)
        for core in cores
    ]
    return [float(process.communicate()[0]) for process in processes]


def measure_expert() -> float:
    """Return the seconds that an expert of Mixtral's shapes takes here for one row."""
    prepare_environment()
    import torch

    from mixchat.install.known_models import KNOWN
    from mixchat.planning.compute_speed import Effort, ExpertTimer
    from mixchat.weights.families.read_config import read_config
    from mixchat.weights.format.blueprint import Blueprint, Quantization

    blueprint = Blueprint(read_config(KNOWN["instruct"].config), Quantization())
    with torch.inference_mode():
        return ExpertTimer(blueprint, Effort(seconds=1)).seconds()[1]


@dataclass(frozen=True)
class Case:
    """A way to compute: with `workers` over a link, or alone with a share of the experts in RAM."""

    workers: int = 0
    link: Link | None = None
    share: float = 0.5

    def __str__(self) -> str:
        if self.link is None:
            return f"one machine, {self.share:.0%} of the experts in memory"
        return f"{self.workers} worker{'s' if self.workers > 1 else ''}, {self.link}"


ALONE, WHOLE = Case(), Case(share=1)


@dataclass(frozen=True)
class Sizes:
    """The model's layers, experts a layer, and hidden_size."""

    layers: int
    experts: int
    hidden: int


def ideal(sizes: Sizes, case: Case, whole: float, timing: Timing) -> float:
    """Return the most tokens a second of decoding: a holder's computing, and the link's own time.

    whole: tokens a second where one machine holds all. In each layer its two experts, one after the
    other, are replaced by the slowest holder's: one, or two where both fall to the same holder. The
    link's time is a round trip and a row each way, unless both are at home. The router is even, and
    each machine holds an even share of its half in each layer. With 1 worker, 4 and 4 of 8 experts:
    both fall to one holder in 12 of 28 cases, and are at home in 6.
    """
    assert case.link is not None
    home = sizes.experts // 2
    shares = [home // case.workers + (n < home % case.workers) for n in range(case.workers)]
    pairs = comb(sizes.experts, CHOSEN)
    same = sum(comb(share, CHOSEN) for share in (home, *shares)) / pairs
    away = 1 - comb(home, CHOSEN) / pairs
    holders = same * CHOSEN * timing.alone + (1 - same) * timing.beside
    link = case.link.round_trip + 2 * 16 * sizes.hidden / case.link.rate
    layer = holders - CHOSEN * timing.alone + away * link
    return 1 / (1 / whole + sizes.layers * layer)


class Report:
    """The measurements: runs by the name of their case, in the order of the rounds."""

    def __init__(self, cases: Sequence[Case], sizes: Sizes) -> None:
        self._cases, self._sizes = cases, sizes
        self.runs: dict[str, list[dict[str, Any]]] = {str(case): [] for case in cases}
        self.timings: list[Timing] = []

    def table(self) -> str:
        """Return medians of all rounds; "times" is the ratio of a round to the one machine's."""
        head = ("", "DECODE", "MIN - MAX", "TIMES", "OF IDEAL", "PROMPT", "TIMES", "DISK GB/S")
        rows = [head, *map(self._cells, self._cases)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (zip(row, widths, strict=True) for row in rows)
        return "\n".join("  ".join(cell.ljust(width) for cell, width in line) for line in lines)

    def _cells(self, case: Case) -> tuple[str, ...]:
        decode, prompt = self._rates(case, 0), self._rates(case, 1)
        disks = [run["disk"] for run in self.runs[str(case)]]
        return (
            str(case),
            f"{median(decode):.2f}",
            f"{min(decode):.2f} - {max(decode):.2f}",
            f"{self._ratio(decode, self._rates(ALONE, 0)):.1f}",
            f"{self._ratio(decode, self._ideals(case)):.0%}" if case.link else "",
            f"{median(prompt):.1f}",
            f"{self._ratio(prompt, self._rates(ALONE, 1)):.1f}",
            f"{median(sorted(disk)[-len(disk) // 4] for disk in disks) / 1e9:.2f}",
        )

    def _rates(self, case: Case, task: int) -> list[float]:
        return [run["bench"]["tasks"][task]["mixchat"][0] for run in self.runs[str(case)]]

    def _ideals(self, case: Case) -> list[float]:
        rounds = zip(self._rates(WHOLE, 0), self.timings, strict=False)
        return [ideal(self._sizes, case, whole, timing) for whole, timing in rounds]

    def _ratio(self, rates: Sequence[float], others: Sequence[float]) -> float:
        return median(one / other for one, other in zip(rates, others, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--links", nargs="*", default=["1:0.2", "1:0.05", "1:1"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--expert", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.expert:
        print(measure_expert())
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and end what was started
    work, model = given.work.absolute(), given.work.absolute() / "models" / MODEL
    try:
        if not model.exists():
            command = [sys.executable, "-m", "mixchat.bench.synthetic", str(model)]
            subprocess.run([*command, str(given.layers)], check=True)
        with network([CHAT, *WORKERS]) as joined:
            measure(joined, work, model, given)
    finally:
        if not given.keep:
            shutil.rmtree(model)


def measure(joined: Network, work: Path, model: Path, given: argparse.Namespace) -> None:
    """Measure round by round; after each one, write the figures and print the table."""
    with InstalledModel(model) as installed:
        blueprint = installed.blueprint
    config = blueprint.config
    sizes = Sizes(config.num_hidden_layers, config.num_local_experts, config.hidden_size)
    links = [Link.parse(text) for text in given.links]
    cases = [ALONE, WHOLE, *(Case(count, link) for link in links for count in given.workers)]
    rig, report = Rig(joined, work, blueprint.expert.stride), Report(cases, sizes)
    options = ["--tokens", str(given.tokens), "--prompt", str(given.prompt)]
    for number in range(1, given.rounds + 1):
        report.timings.append(expert_timing())
        for case in cases:
            held = int(case.share * blueprint.expert_count)
            rest = blueprint.expert_count - held
            run = rig.measure(options, held, case.workers, rest, case.link)
            report.runs[str(case)].append(run)
            rates = (task["mixchat"][0] for task in run["bench"]["tasks"])
            print(number, case, *(f"{rate:.2f}" for rate in rates), flush=True)
        timings = [asdict(timing) for timing in report.timings]
        figures = {"sizes": asdict(sizes), "timings": timings, "runs": report.runs}
        (work / "workers.json").write_text(json.dumps(figures, indent=1))
        print(report.table(), flush=True)


if __name__ == "__main__":
    main()
