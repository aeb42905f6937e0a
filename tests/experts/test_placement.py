import pytest

from mixchat.errors import ResourceError, UsageError
from mixchat.experts.placement import Placement, place
from mixchat.settings import MemoryBudget

GB = 10**9
MIXTRAL = {"shared": 3 * GB, "context": GB, "expert": GB // 10, "experts": 256}


def budget(text: str) -> MemoryBudget:
    return MemoryBudget.parse(text)


def test_everything_fits_a_large_machine() -> None:
    assert place(free=64 * GB, budget=None, **MIXTRAL) == Placement(slots=256, experts=256)


def test_a_tenth_of_the_memory_is_left_alone() -> None:
    # 16 - 3 shared - 1 context - 1.6 reserve = 10.4 GB
    assert place(free=16 * GB, budget=None, **MIXTRAL).slots == 104


def test_a_tight_machine_still_gets_two_slots() -> None:
    assert place(free=4_250_000_000, budget=None, **MIXTRAL).slots == 2


def test_a_budget_is_bytes_of_experts_or_a_share_of_them() -> None:
    assert place(free=64 * GB, budget=budget("1GB"), **MIXTRAL).slots == 10
    assert place(free=64 * GB, budget=budget("50%"), **MIXTRAL).slots == 128
    assert place(free=64 * GB, budget=budget("1TB"), **MIXTRAL).slots == 256


def test_too_small_a_budget_names_the_least() -> None:
    with pytest.raises(UsageError, match=r"199 MB is too small: two experts take 200.0 MB"):
        place(free=64 * GB, budget=budget("199MB"), **MIXTRAL)
    assert place(free=64 * GB, budget=budget("200MB"), **MIXTRAL).slots == 2


def test_a_budget_beyond_the_machine_is_refused_with_both_numbers() -> None:
    with pytest.raises(ResourceError, match=r"asks for 8 GB, 6 GB are free"):
        place(free=10 * GB, budget=budget("8GB"), **MIXTRAL)


def test_a_model_beyond_the_machine_is_refused_with_both_numbers() -> None:
    with pytest.raises(ResourceError, match=r"at least 4\.2 GB .* 4\.1 GB are free"):
        place(free=4_100_000_000, budget=None, **MIXTRAL)
