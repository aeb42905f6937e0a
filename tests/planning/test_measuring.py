"""Measuring this machine: figures are those of what ran, and nothing stays behind."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixchat.planning import measuring
from mixchat.planning.compute_speed import Effort
from mixchat.planning.disk_speed import DiskRates
from mixchat.planning.measuring import take_speeds
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.expert import Expert
from mixchat.weights.format.installed_model import InstalledModel

CPU = torch.device("cpu")
QUICK = Effort(file_bytes=1_000_000, pool_bytes=200_000, seconds=0.01)


class Clock:
    """Time that passes in `sleep`, and a little at each look; nothing else counts."""

    def __init__(self) -> None:
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        self.now += 1e-5
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time by which all but the disk is measured."""
    clock = Clock()
    monkeypatch.setattr("mixchat.planning.compute_speed.time", clock)
    return clock


@pytest.fixture
def taking(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Callable[[float], None]:
    """Let experts compute nothing, and take so many seconds for each row."""

    def set_seconds(seconds_per_row: float) -> None:
        def compute(expert: Expert, x: torch.Tensor) -> torch.Tensor:
            clock.sleep(seconds_per_row * len(x))
            return x

        monkeypatch.setattr(Expert, "__call__", compute)

    return set_seconds


@pytest.fixture
def blueprint(tiny_model: Path) -> Blueprint:
    """The tiny model with a dense w2, so that experts are computed one by one."""
    with InstalledModel(tiny_model) as installed:
        config = replace(installed.config, intermediate_size=96)
        return replace(installed.blueprint, config=config)


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Let a layer compute this instead of nothing."""

    def set_layer(compute: Callable[[], None]) -> None:
        monkeypatch.setattr(measuring, "layer_probe", lambda blueprint: compute)

    set_layer(lambda: None)
    return set_layer


def test_a_cpu_is_measured_and_nothing_stays_behind(blueprint, tmp_path, layer):
    result = take_speeds(blueprint, tmp_path / "not there yet", [], QUICK)
    assert set(result.expert_seconds) >= {1, 8}  # the others too, unless cores are busy
    assert all(seconds > 0 for seconds in result.expert_seconds.values())
    assert result.gpus == ()
    assert 1e5 < result.disk_busy < 1e12
    assert 1e5 < result.disk_idle < 1e12
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seconds_per_row", [0, 0.0005])
def test_figures_are_those_of_what_ran(blueprint, tmp_path, taking, layer, seconds_per_row):
    taking(seconds_per_row)
    seconds = take_speeds(blueprint, tmp_path, [], QUICK).expert_seconds
    if seconds_per_row:
        assert seconds[8] == pytest.approx(0.004, rel=0.05)
        assert 512 not in seconds  # it would have taken a quarter of a second
    else:
        assert set(seconds) == {1, 8, 64, 512}


@pytest.mark.parametrize(
    ("pauses", "seconds"),
    [
        # Kernels that were compiled the first time made a plan promise 0.01 tokens a second.
        (itertools.chain([5.0], itertools.repeat(0.004)), 0.004),
        # Medians promised 2.9 times the speed when other programs took the cores now and then.
        (itertools.cycle([0.001, 0.001, 0.001, 0.009]), 0.003),
    ],
    ids=["without the first time", "the mean"],
)
def test_a_figure_is_the_mean_of_what_came_after_the_first_time(
    blueprint, tmp_path, clock, taking, layer, pauses, seconds
):
    def compute():
        assert torch.is_inference_mode_enabled()
        clock.sleep(next(pauses))

    taking(0)
    layer(compute)
    effort = dataclasses.replace(QUICK, seconds=0.1)
    result = take_speeds(blueprint, tmp_path, [], effort)
    assert result.layer_seconds == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize("each", [0.05, 20.0])
def test_measuring_a_busy_machine_has_an_end(blueprint, tmp_path, monkeypatch, clock, layer, each):
    """It took five minutes while other programs had the cores, ten seconds without them."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    tries: Counter[str] = Counter()

    def compute(expert, x):
        tries["expert"] += 1
        clock.sleep(each)
        return x

    def read(*given):
        tries["disk"] += 1
        clock.sleep(3 * each)
        return DiskRates(2e9, 3e9)

    monkeypatch.setattr(Expert, "__call__", compute)
    monkeypatch.setattr(measuring, "time", clock)
    monkeypatch.setattr(measuring, "measure_disk", read)
    layer(lambda: clock.sleep(each))
    measuring.measure_machine(blueprint, tmp_path, CPU)
    once = 9 * each  # what is computed is tried twice, for the first time does not count
    assert clock.now < max(measuring.MOST_SECONDS, once + 0.1)
    if each > 1:
        assert tries == {"expert": 4, "disk": 1}


def test_experts_larger_than_the_caches_are_computed_in_turn(
    blueprint, tmp_path, clock, layer, monkeypatch
):
    seen: dict[int, Expert] = {}
    compute = Expert.__call__

    def watch(expert, x):
        seen[id(expert)] = expert
        assert compute(expert, x).isfinite().all()
        return x

    monkeypatch.setattr(Expert, "__call__", watch)
    take_speeds(blueprint, tmp_path, [], QUICK)
    assert len(seen) * blueprint.expert.stride >= QUICK.pool_bytes


def test_the_disk_is_measured_with_four_experts_at_least_while_the_cpu_computes_some(
    blueprint, tmp_path, layer, monkeypatch
):
    asked = []
    rows: list[int] = []

    def measure_disk(directory, block, size, work, *_):
        rows.clear()
        work()
        asked.append((directory, block, size, [*rows]))
        return DiskRates(2e9, 3e9)

    def watch(expert, x):
        rows.append(len(x))
        return x

    monkeypatch.setattr("mixchat.planning.measuring.measure_disk", measure_disk)
    monkeypatch.setattr(Expert, "__call__", watch)
    for file_bytes in (1, 10**6):
        effort = dataclasses.replace(QUICK, file_bytes=file_bytes)
        result = take_speeds(blueprint, tmp_path, [], effort)
        assert (result.disk_busy, result.disk_idle) == (2e9, 3e9)
    stride = blueprint.expert.stride
    assert asked == [(tmp_path, stride, size, [1]) for size in (4 * stride, 10**6)]
