"""The time of a decoded layer with workers, split: computing here, sending, waiting, the rest.

    python tests/benchmarks/layer_split.py MODEL_DIRECTORY TOKENS HOST_MEMORY KEY_FILE WORKER...

Prints JSON, in seconds of a layer and as the mean of all layers of TOKENS tokens: `layer` in all,
`sending` rows to workers, `computing` experts here meanwhile, `waiting` for workers after that,
`rest` (attention, router, sums), and `worker`, the computing of all workers by their own clocks.
`tests/benchmarks/workers.py` runs it on machines that it makes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mixchat.engine.environment import prepare_environment

prepare_environment()

from mixchat.base.options import LoadOptions, SamplingOptions  # noqa: E402
from mixchat.base.quantities import MemoryBudget  # noqa: E402
from mixchat.experts.compute import HostCompute  # noqa: E402
from mixchat.experts.workers.link import Link  # noqa: E402
from mixchat.experts.workers.remote_worker import RemoteWorker  # noqa: E402
from mixchat.loading.loader import load_engine  # noqa: E402

PROMPT = list(range(100, 132))
WARM = 24  # tokens, in which experts are loaded


class Clock:
    """Adds up the seconds that methods take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: type, method: str, name: str) -> None:
        """Count the time of a method of all objects of a class."""
        original: Callable[..., Any] = getattr(owner, method)

        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*arguments, **named)
            finally:
                self.add(name, time.perf_counter() - start)

        setattr(owner, method, timed)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIRECTORY")
    parser.add_argument("tokens", type=int)
    parser.add_argument("memory", type=MemoryBudget.parse, metavar="HOST_MEMORY")
    parser.add_argument("key_file", type=Path)
    parser.add_argument("workers", nargs="+", metavar="WORKER")
    given = parser.parse_args()
    clock, links = Clock(), []
    opened = Link.__init__
    Link.__init__ = lambda *given: links.append(given[0]) or opened(*given)
    clock.watch(RemoteWorker, "begin", "sending")
    clock.watch(RemoteWorker, "finish", "waiting")
    for method in ("begin", "prefetch", "compute_next"):
        clock.watch(HostCompute, method, "computing")
    options = LoadOptions(given.memory, workers=tuple(given.workers), key_file=given.key_file)
    engine = load_engine(given.model, options)
    greedy = SamplingOptions(temperature=0)
    answer = engine.generate(PROMPT, sampling=greedy, stop_ids=frozenset())
    for _ in range(1 + WARM):
        next(answer)
    clock.seconds.clear()
    computed, before = sum(link.seconds_computing for link in links), engine.stats
    for _ in range(given.tokens):
        next(answer)
    clock.add("worker", sum(link.seconds_computing for link in links) - computed)
    clock.add("layer", engine.stats.decode_seconds - before.decode_seconds)
    layers = given.tokens * engine.config.num_hidden_layers
    split = {name: seconds / layers for name, seconds in clock.seconds.items()}
    parts = ("sending", "computing", "waiting")
    split["rest"] = split["layer"] - sum(split.get(name, 0.0) for name in parts)
    split["misses"] = (engine.stats.experts.misses - before.experts.misses).total() / layers
    print(json.dumps(split))


if __name__ == "__main__":
    main()
