"""The bench on a tiny model, with limits and a peer that are known."""

from pathlib import Path

import pytest
import torch

from mixchat.bench import rounds
from mixchat.bench.machine_limits import Limits
from mixchat.bench.rounds import Bench, Row, Tasks
from mixchat.loading.loader import LoadOptions

TASKS = Tasks(contexts=(0, 40), prompts=(16,), tokens=5, rounds=3)


class KnownLimits:
    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def measure(self) -> Limits:
        return Limits(memory=1e9, gemm=2e9)


class Peer:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def decode(self, context: int, tokens: int) -> float:
        assert tokens == 5
        self.asked.append(("decode", context))
        return 10.0

    def prefill(self, tokens: int) -> float:
        self.asked.append(("prefill", tokens))
        return 100.0


@pytest.fixture
def bench(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(rounds, "LimitsMeter", KnownLimits)
    monkeypatch.setattr(rounds, "disk_bandwidth", lambda directory, block: 3e9)
    bench = Bench(tiny_model, LoadOptions(device="cpu", context_size=128), TASKS)
    bench.start_cold()
    return bench


def test_each_task_is_measured_in_each_round(bench: Bench) -> None:
    peer = Peer()
    assert len(list(bench.run(peer))) == 9
    assert [row.name for row in bench.rows] == [
        "decode behind 0 tokens",
        "decode behind 40 tokens",
        "prompt of 16 tokens",
    ]
    assert all(len(row.ours) == len(row.most) == 3 and min(row.ours) > 0 for row in bench.rows)
    assert len(bench.limits) == 9


def test_the_peer_computes_a_long_context_only_once(bench: Bench) -> None:
    peer = Peer()
    list(bench.run(peer))
    assert peer.asked == [
        *[("decode", 0), ("decode", 40), ("prefill", 16)],
        *[("decode", 0), ("prefill", 16)] * 2,
    ]


def test_a_limit_is_what_the_bytes_and_operations_allow(bench: Bench) -> None:
    list(bench.run(None))
    here, behind, prompt = bench.rows
    assert here.most[0] > behind.most[0]  # more bytes, fewer tokens
    assert here.most[0] == pytest.approx(1e9 / rounds.bytes_per_token(bench.blueprint, 0, None))
    assert prompt.most[0] == pytest.approx(2e9 / rounds.operations_per_token(bench.blueprint))
    assert here.to_peer is None


def test_decoding_meets_the_context_that_was_asked_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    real = type(bench.engine._cache).attend

    def attend(cache: object, layer: int, *arguments: object) -> object:
        if layer == 0:
            lengths.append(cache.length)
        return real(cache, layer, *arguments)

    monkeypatch.setattr(type(bench.engine._cache), "attend", attend)
    bench._decode(40)
    assert lengths == [40 + number for number in range(len(lengths))]
    assert len(lengths) == 1 + 2 + 5


def test_the_cold_start_reads_the_model(bench: Bench) -> None:
    cold = bench.cold_start
    assert 0 < cold.load_seconds < cold.first_token_seconds
    shared = bench.blueprint.shared_size
    experts = bench.blueprint.expert_count * bench.blueprint.expert.stride
    assert shared < cold.bytes <= shared + experts
    assert (cold.disk, cold.copy) == (3e9, None)


def test_a_ratio_is_that_of_a_round_not_of_the_medians() -> None:
    row = Row("task", "memory", ours=[10.0, 20.0, 40.0], most=[20.0, 40.0, 40.0], peer=[5.0])
    assert row.of_limit == 0.5
    assert row.to_peer == 2.0
