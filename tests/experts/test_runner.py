import contextlib
from pathlib import Path

import pytest
import torch

from mixchat.errors import CheckpointError
from mixchat.experts.cache import ExpertKey, LRUCache
from mixchat.experts.mover import Mover, Transfer
from mixchat.experts.runner import CachedExpertRunner, compute
from mixchat.experts.store import DiskSource, ExpertSource, ExpertStore, HostSource
from mixchat.weights import nf4
from mixchat.weights.checkpoint import KeptModel

CPU = torch.device("cpu")


def runner(kept: KeptModel, slots: int, source: ExpertSource | None = None) -> CachedExpertRunner:
    layout = "cpu-packed" if nf4.has_packed_kernel() else "bitsandbytes"
    store = ExpertStore(
        source or DiskSource(kept),
        slots,
        stored=kept.blueprint.expert,
        used=kept.blueprint.in_layout(layout).expert,
        device=CPU,
    )
    return CachedExpertRunner(LRUCache(slots), store)


def routing(tokens: int, choices: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 64, generator=generator).to(torch.bfloat16)
    scores = torch.randn(tokens, 4, generator=generator)
    kept, selected = scores.topk(choices, dim=-1)
    return hidden, selected, kept.softmax(-1)


def slow(kept: KeptModel, layer: int, *inputs: torch.Tensor) -> torch.Tensor:
    """Token by token, choice by choice, from freshly read experts."""
    hidden, selected, weights = inputs
    one = runner(kept, 8)
    rows = []
    for token in range(hidden.shape[0]):
        total = torch.zeros(64)
        for choice in range(selected.shape[1]):
            key = ExpertKey(layer, int(selected[token, choice]))
            one._begin([key])
            expert = one._ready(key)
            total += compute(expert, hidden[token : token + 1])[0].float() * weights[token, choice]
        rows.append(total)
    return torch.stack(rows).to(hidden.dtype)


@pytest.fixture
def kept(tiny_model: Path) -> KeptModel:
    return KeptModel(tiny_model)


@pytest.mark.parametrize("choices", [1, 2, 3])
@pytest.mark.parametrize("slots", [2, 3, 8])
def test_grouping_by_expert_equals_going_token_by_token(
    kept: KeptModel, slots: int, choices: int
) -> None:
    inputs = routing(17, choices)
    result = runner(kept, slots).run(1, *inputs)
    torch.testing.assert_close(result, slow(kept, 1, *inputs), rtol=0.01, atol=1e-3)


def test_the_size_of_the_cache_and_its_state_do_not_show_in_the_result(kept: KeptModel) -> None:
    runners = [runner(kept, slots) for slots in (2, 3, 5, 8)]
    for seed in range(20):
        inputs = routing(1 + seed % 5, seed=seed)
        results = [each.run(seed % 2, *inputs) for each in runners]
        assert all(torch.equal(results[0], other) for other in results[1:])
    assert runners[0].stats.misses > runners[3].stats.misses == 8


def test_each_expert_is_touched_once_a_call(kept: KeptModel) -> None:
    small = runner(kept, 2)
    small.run(0, *routing(64))
    assert small.stats.misses == 4
    assert small.stats.hits == 0


def test_experts_in_the_cache_are_used_before_others_evict_them(kept: KeptModel) -> None:
    """Walking 0, 1, 2, 3 with two slots in plain LRU order would never hit."""
    small = runner(kept, 2)
    inputs = routing(64)
    small.run(0, *inputs)
    small.run(0, *inputs)
    assert small.stats.hits == 2
    assert small.stats.bytes_moved == 6 * kept.blueprint.expert.nbytes


def test_ram_over_the_file_and_a_staging_buffer_give_the_same_bytes(kept: KeptModel) -> None:
    inputs = routing(9)
    locked: list[torch.Tensor] = []
    for source in (HostSource(kept, locked.append), DiskSource(kept, locked.append)):
        result = runner(kept, 2, source).run(1, *inputs)
        assert torch.equal(result, runner(kept, 2).run(1, *inputs))
    assert [len(buffer) for buffer in locked] == [8, 1]


class Failing:
    """A source whose loads fail, after half of the bytes, until told otherwise."""

    def __init__(self, kept: KeptModel) -> None:
        self.source, self.fail = DiskSource(kept), True

    def load(self, key: ExpertKey, slot: torch.Tensor) -> None:
        if self.fail:
            slot.fill_(255)
            raise CheckpointError("cut short")
        self.source.load(key, slot)


def test_a_load_that_fails_leaves_no_half_expert_behind(kept: KeptModel) -> None:
    source = Failing(kept)
    failing = runner(kept, 3, source)
    inputs = routing(3)
    for _ in range(3):
        with pytest.raises(CheckpointError, match="cut short"):
            failing.run(0, *inputs)
    source.fail = False
    assert torch.equal(failing.run(0, *inputs), runner(kept, 8).run(0, *inputs))


def test_an_interrupt_while_an_expert_is_on_its_way_harms_nothing(
    kept: KeptModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [runner(kept, 8).run(0, *routing(3, seed=seed)) for seed in range(6)]
    interrupted = runner(kept, 3)

    def interrupt(transfer: Transfer) -> None:
        raise KeyboardInterrupt

    for seed in range(6):
        with monkeypatch.context() as patch:
            patch.setattr(Transfer, "wait", interrupt)
            with contextlib.suppress(KeyboardInterrupt):
                interrupted.run(0, *routing(3, seed=seed))
        assert torch.equal(interrupted.run(0, *routing(3, seed=seed)), expected[seed])


def test_an_interrupt_before_a_transfer_is_queued_harms_nothing(
    kept: KeptModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache knows the expert then, and nobody is bringing it."""
    interrupted = runner(kept, 3)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Mover, "begin", interrupt)
        with pytest.raises(KeyboardInterrupt):
            interrupted.run(0, *routing(3))
    assert torch.equal(interrupted.run(0, *routing(3)), runner(kept, 8).run(0, *routing(3)))


def test_the_next_experts_are_on_their_way_while_one_is_computed(kept: KeptModel) -> None:
    begun: list[int] = []

    class Noting(DiskSource):
        def load(self, key: ExpertKey, slot: torch.Tensor) -> None:
            begun.append(key.expert)
            super().load(key, slot)

    noting = runner(kept, 4, Noting(kept))
    noting._begin([ExpertKey(0, expert) for expert in (3, 0, 2)])
    noting._ready(ExpertKey(0, 2))  # the last to come
    assert begun == [3, 0, 2]
    assert noting.stats.misses == 3
