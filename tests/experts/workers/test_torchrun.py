"""Ranks that torchrun starts find each other, and are nothing special without it."""

import pytest
from torch import distributed as dist

from mixchat.base.errors import MixchatError, UsageError
from mixchat.experts.workers import torchrun


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torchrun, "_store_of_the_test", store, raising=False)  # as long as it
    return monkeypatch


def test_without_torchrun_there_is_no_rank_and_no_worker(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "1")  # of some other program
    assert torchrun.rank() is None
    assert torchrun.published() == ()


def test_rank_0_learns_where_the_workers_listen_and_they_when_it_ends(variables):
    for rank in (2, 1):
        variables.setenv("RANK", str(rank))
        assert torchrun.rank() == rank
        assert torchrun.local_address() == "127.0.0.1:0"
        over = torchrun.publish(f"127.0.0.1:500{rank}")
        torchrun.end()  # of no effect: it is not rank 0
    variables.setenv("RANK", "0")
    assert torchrun.published() == ("127.0.0.1:5001", "127.0.0.1:5002")
    assert not over()
    torchrun.end()
    assert over()


def test_a_store_that_is_not_there_is_one_clear_line(variables):
    variables.setenv("RANK", "0")
    variables.setenv("MASTER_PORT", "none")
    with pytest.raises(MixchatError, match="torchrun's store cannot be reached"):
        torchrun.published()
    with pytest.raises(UsageError, match=r"MASTER_ADDR '127\.0\.0\.1' cannot"):
        torchrun.local_address()


def test_a_rank_that_is_no_number_is_one_clear_line(variables):
    variables.setenv("RANK", "first")
    with pytest.raises(UsageError, match="RANK is missing, or no number"):
        torchrun.rank()
