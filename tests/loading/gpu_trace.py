"""Profiles one token of tiny models on a GPU, for tests/gpu.sh, beside the budget.

tests/benchmarks/test_gpu_budget.py holds the same budget on paper.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from paper_runtime import RUNTIME
from paper_tools import EXPERTS, LAYERS, PASSES, Case, load, random_case
from torch.profiler import ProfilerActivity, profile, record_function

_LAUNCH = re.compile(
    r"^(cuda|cu|hip)\w*(LaunchKernel|GraphLaunch|MemcpyAsync|MemcpyWithStream|MemsetAsync)"
)
_SYNC = re.compile(r"^(cuda|cu|hip)\w*(Stream|Event|Device)Synchronize")
_TOKEN = "one token"


class Event(NamedTuple):
    """What a profiler saw: a call of the host, or a kernel or copy on the GPU."""

    name: str
    on_gpu: bool


class Counts(NamedTuple):
    """What one token takes: launches of the host, kernels and copies, and waits of the host."""

    launches: int
    kernels: int
    syncs: int


class Row(NamedTuple):
    """The counts of a token, and the most that they may be."""

    name: str
    counts: Counts
    most: Counts
    seconds: float

    @property
    def is_over(self) -> bool:
        return any(count > most for count, most in zip(self.counts, self.most, strict=True))


def rows(folder: Path | None) -> Iterator[Row]:
    """Yield and print what tokens take. Traces go to the folder; None is a GPU on paper."""
    for kind in ("nf4",) if folder is None else ("nf4", "mxfp4", "trellis2"):
        with tempfile.TemporaryDirectory() as temporary:
            case = random_case(Path(temporary) / "model", kind, PASSES)
            for spread in ("all in VRAM", "half in RAM"):
                row = _row(case, f"{kind}, {LAYERS} layers, {spread}", spread, folder)
                told = (
                    f"{count} {name} (at most {most})"
                    for name, count, most in zip(Counts._fields, row.counts, row.most, strict=True)
                )
                print(f"{row.name}: {', '.join(told)}, {row.seconds * 1e6:.0f} us")
                yield row


def counted(events: Iterable[Event]) -> Counts:
    """Count the events of a profile."""
    events = list(events)
    calls = [event.name for event in events if not event.on_gpu]
    return Counts(
        sum(bool(_LAUNCH.match(name)) for name in calls),
        sum(event.on_gpu for event in events),
        sum(bool(_SYNC.match(name)) for name in calls),
    )


def _row(case: Case, name: str, spread: str, folder: Path | None) -> Row:
    whole = spread == "all in VRAM"
    # A row, a position, a graph and the last copy; or two graphs and a copy a layer. Copies count
    # among the GPU's work: three tensors that a layer tells the host, and one that it gets.
    work = (12 if whole else 12 + 5) * LAYERS + 8
    most = Counts(4, work, 1) if whole else Counts(3 * LAYERS + 4, work, LAYERS + 1)
    engine = load(case, EXPERTS if whole else EXPERTS // 2 + 2, EXPERTS)
    forward, cache = engine.passes.model.forward, engine.held()[1]
    with torch.inference_mode():
        forward(torch.tensor(PASSES[0]), cache)
        while engine.experts.is_filling:
            time.sleep(0.01)
        forward(torch.tensor([3]), cache)
        start = time.perf_counter()
        forward(torch.tensor([7]), cache)
        seconds = time.perf_counter() - start
        trace = folder and folder / f"gpu-trace-{name.replace(', ', '-').replace(' ', '-')}.json"
        counts = _profiled(forward, cache, trace)
    engine.close()
    return Row(name, counts, most, seconds)


def _profiled(forward: Any, cache: Any, path: Path | None) -> Counts:
    """Return what a token takes, as the profiler sees it, or the GPU on paper if `path` is None."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if path else [])]
    before = _on_paper()
    with profile(activities=kinds) as profiled:
        with record_function(_TOKEN):
            forward(torch.tensor([5]), cache)
        after = _on_paper()
    events = [(each, str(each.device_type) != "DeviceType.CPU") for each in profiled.events()]
    (token,) = [each.time_range for each, on_gpu in events if each.name == _TOKEN and not on_gpu]
    # What the profiler itself waits for comes after the token.
    found = counted(
        Event(each.name, on_gpu)
        for each, on_gpu in events
        if token.start <= each.time_range.start <= token.end and each.name != _TOKEN
    )
    if path is None:
        return Counts(*(now - then for now, then in zip(after, before, strict=True)))
    profiled.export_chrome_trace(str(path))
    return found


def _on_paper() -> Counts:
    return Counts(RUNTIME.launches, RUNTIME.kernels, RUNTIME.waits)
