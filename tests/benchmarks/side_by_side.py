"""`mixchat bench` with llama.cpp beside it: both measured in the same rounds, by turns.

    python tests/benchmarks/side_by_side.py MODEL --gguf FILE [--python PYTHON] [options]
    python tests/benchmarks/side_by_side.py --synthetic LAYERS [--format Q4_0] [--python PYTHON]
        [...]

FILE is the same model for llama.cpp; of a synthetic model it is written, in its format FORMAT.
PYTHON has llama-cpp-python and gguf (see `peer_child.py`). The options are those of `mixchat bench`
but for workers. What else the machine does slows both alike, and memory that changes its speed
within seconds hits both if a round has several turns. A ratio is that of one round; what is shown
is the median of all rounds, and the range. Contexts are random keys and values here, and in
llama.cpp up to 512 tokens and copies of these, since computing 32,768 tokens would take minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from llama_formats import FORMATS
from peer import Peer, require, write_model

from mixchat.base.errors import MixchatError
from mixchat.base.quantities import MemoryBudget
from mixchat.engine.environment import prepare_environment

if TYPE_CHECKING:
    from mixchat.bench.rounds import Bench, BenchTask


class SideBySide:
    """A bench, and llama.cpp's tokens a second for each of its tasks. A round has some turns."""

    def __init__(self, bench: Bench, peer: Peer, tokens: int, turns: int) -> None:
        self.bench, self._peer, self._tokens, self._turns = bench, peer, tokens, turns
        self.rates: list[list[float]] = [[] for _ in bench.tasks]

    def run(self) -> Iterator[None]:
        """Measure turn by turn; yields after each task."""
        for number, task in enumerate(self.bench.run()):
            self.rates[number % len(self.rates)].append(self._measure(task))
            yield

    def _measure(self, task: BenchTask) -> float:
        if task.phase == "decode":
            return self._peer.decode(task.length, self._tokens)
        return self._peer.prefill(task.length)

    def as_dict(self) -> dict[str, Any]:
        """Return what `mixchat bench --json` prints, with llama.cpp's figures."""
        from mixchat.cli.output.bench_report import BenchReport

        found = BenchReport(self.bench).as_json()
        for task, ours, theirs in zip(found["tasks"], self.bench.tasks, self.rates, strict=True):
            times = ratios(ours.rates, theirs, self._turns)
            task |= {"llama.cpp": theirs, "times": times, "to_peer": median(times)}
        return found

    def as_text(self) -> str:
        """Return what `mixchat bench` prints, with two columns more."""
        from mixchat.cli.output.bench_report import BenchReport, task_table
        from mixchat.cli.output.reports import aligned

        more = [("LLAMA.CPP", "TIMES", "MIN - MAX")]
        for task, rates in zip(self.bench.tasks, self.rates, strict=True):
            times = ratios(task.rates, rates, self._turns)
            spread = f"{min(times):.2f} - {max(times):.2f}"
            more.append((f"{median(rates):.1f}", f"{median(times):.2f}", spread))
        cells = zip(task_table(self.bench.tasks), more, strict=True)
        table = aligned([row + others for row, others in cells])
        return f"{BenchReport(self.bench).heading()}\n\n{table}"

    def draw(self, png: Path) -> None:
        """Draw bars for each task, of each program and the limit, with the slowest and fastest."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3 + 2.5 * len(self.rates), 5), layout="constrained")
        panels = figure.subplots(1, len(self.rates), squeeze=False)[0]
        for axes, task, theirs in zip(panels, self.bench.tasks, self.rates, strict=True):
            bars = {"mixchat": task.rates, "limit": task.limit_rates, "llama.cpp": theirs}
            middle = [median(rates) for rates in bars.values()]
            below = [median(rates) - min(rates) for rates in bars.values()]
            above = [max(rates) - median(rates) for rates in bars.values()]
            axes.bar(list(bars), middle, yerr=[below, above])
            axes.set(title=task.name, ylabel="tok/s")
        figure.savefig(png)


def ratios(ours: Sequence[float], theirs: Sequence[float], turns: int) -> list[float]:
    """Return how many times as fast mixchat is, in each round of so many turns."""
    seconds, of_peer = ([1 / rate for rate in rates] for rates in (ours, theirs))
    rounds = [slice(start, start + turns) for start in range(0, len(seconds), turns)]
    return [sum(of_peer[part]) / sum(seconds[part]) for part in rounds]


def main(arguments: Sequence[str] | None = None) -> None:
    given = parsed(arguments)
    prepare_environment()
    from mixchat.base.options import LoadOptions
    from mixchat.bench.rounds import Bench, BenchOptions
    from mixchat.planning.torch_threads import choose_threads

    contexts, prompts = given.context or (0,), [n for n in given.prompt or (512,) if n]
    options = BenchOptions(contexts, prompts, given.tokens, given.rounds * given.turns)
    load = LoadOptions(
        given.host_memory and MemoryBudget.parse(given.host_memory),
        MemoryBudget.parse_list(given.device_memory) if given.device_memory else (),
        context_size=options.context_size,
        kv_bits=given.kv_bits,
        exact_prompts=given.exact_prompts,
        device=given.device,
    )
    require(given.python)
    with models(given) as (directory, gguf):
        kv_bits = given.kv_bits or 16
        with Peer(given.python, gguf, options.context_size, given.gpu_layers, kv_bits) as peer:
            bench = Bench(directory, load, options)
            choose_threads(bench.blueprint)
            bench.start_cold()
            both = SideBySide(bench, peer, given.tokens, given.turns)
            for number, _ in enumerate(both.run(), 1):
                print(f"{number} tasks measured", end="\r", file=sys.stderr)
        print(json.dumps(both.as_dict(), indent=2) if given.json else both.as_text())
        if given.png is not None:
            both.draw(given.png)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--gguf", type=Path, metavar="FILE")
    parser.add_argument("--synthetic", type=int, metavar="LAYERS")
    parser.add_argument("--shape", default="instruct", metavar="NAME", help="of --synthetic")
    parser.add_argument("--dense-bits", type=int, metavar="N", help="of --synthetic")
    parser.add_argument("--format", choices=FORMATS, default="Q4_0", help="of --synthetic")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--gpu-layers", type=int, default=0, metavar="N", help="of llama.cpp")
    parser.add_argument("--context", type=int, action="append", metavar="N")
    parser.add_argument("--prompt", type=int, action="append", metavar="N")
    parser.add_argument("--tokens", type=int, default=48, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--turns", type=int, default=4, metavar="N", help="in a round")
    parser.add_argument("--kv-bits", type=int, choices=(8, 16), metavar="N")
    parser.add_argument("--exact-prompts", action="store_true")
    parser.add_argument("--host-memory", metavar="SIZE")
    parser.add_argument("--device-memory", metavar="SIZE")
    parser.add_argument("--device", metavar="NAME")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--png", type=Path, metavar="FILE")
    given = parser.parse_args(arguments)
    if (given.model is None) == (given.synthetic is None):
        parser.error("give a MODEL, or --synthetic LAYERS")
    if given.model and given.gguf is None:
        parser.error("a MODEL needs --gguf FILE, the same model for llama.cpp")
    return given


@contextmanager
def models(given: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """Yield the directory of mixchat's model and the file of llama.cpp's."""
    from mixchat.bench.synthetic import synthetic_model
    from mixchat.install.models import installed_directory

    if given.synthetic is None:
        yield installed_directory(given.model), given.gguf
        return
    form = {"shape": given.shape, "dense_bits": given.dense_bits}
    with synthetic_model(given.synthetic, **form) as directory:
        gguf = directory.parent / "synthetic.gguf"
        write_model(given.python, gguf, given.synthetic, given.format, given.shape)
        yield directory, gguf


if __name__ == "__main__":
    try:
        main()
    except MixchatError as error:
        raise SystemExit(f"error: {error}\nhint: {error.hint or 'none'}") from None
