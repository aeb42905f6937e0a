"""The bench on a tiny model, with limits that are known."""

from pathlib import Path

import pytest

from mixchat.base.options import LoadOptions
from mixchat.bench import rounds
from mixchat.bench.rounds import Bench, BenchOptions, BenchTask

OPTIONS = BenchOptions(contexts=(0, 40), prompts=(16,), tokens=5, rounds=2)


@pytest.fixture
def bench(tiny_model: Path, known_limits: None) -> Bench:
    bench = Bench(tiny_model, LoadOptions(device="cpu", context_size=128), OPTIONS)
    bench.start_cold()
    return bench


def test_decoding_is_measured_token_by_token(bench):
    """Random weights repeat themselves: with speculation they would seem faster than any text."""
    list(bench.run())
    assert bench.engine.stats.speculation.passes == 0
    assert bench.engine.speculation is None


def test_a_limit_is_what_the_bytes_and_operations_allow(bench):
    list(bench.run())
    here, later, prompt = bench.tasks
    size = rounds.bytes_per_token(bench.blueprint, 0, None)
    operations = rounds.operations_per_token(bench.blueprint)
    assert here.limit_rates[0] > later.limit_rates[0]  # more bytes, fewer tokens
    assert here.limit_rates[0] == pytest.approx(1e9 / size)
    assert prompt.limit_rates[0] == pytest.approx(2e9 / operations)


def test_decoding_meets_the_context_that_was_asked_for(bench, monkeypatch):
    lengths: list[int] = []
    first = bench.engine.held()[1].layers[0]
    real = first.attend

    def attend(*arguments):
        lengths.append(first.length)
        return real(*arguments)

    monkeypatch.setattr(first, "attend", attend)
    bench.measure(BenchTask("decode", 40))
    assert lengths == [40 + number for number in range(len(lengths))]
    assert len(lengths) == 1 + 2 + 5


def test_the_cold_start_reads_the_model(bench):
    cold = bench.cold_start
    assert cold.seconds == cold.starting + cold.loading + cold.prompt.seconds
    assert cold.shared == bench.blueprint.shared_size
    experts = bench.blueprint.expert_count * bench.blueprint.expert.stride
    assert 0 < cold.prompt.bytes_read <= experts
    assert 0 <= cold.prompt.waiting < cold.prompt.seconds
    assert (cold.disk, cold.copy) == (3e9, None)


def test_a_later_prompt_finds_all_experts_in_memory(bench):
    warm = bench.cold_start.warm
    assert (warm.bytes_read, warm.waiting) == (0, 0)
    assert warm.computing == warm.seconds > 0


def test_a_ratio_is_that_of_a_round_not_of_the_medians():
    task = BenchTask("decode", 0, rates=[10.0, 20.0, 40.0], limit_rates=[20.0, 40.0, 40.0])
    assert task.of_limit == 0.5
    assert task.limited_by == "memory"


def test_the_context_holds_the_longest_task_and_what_measuring_adds():
    assert BenchOptions((0, 300), (200,), tokens=10).context_size > 310
    assert BenchOptions((0,), (2000,), tokens=10).context_size > 2000
