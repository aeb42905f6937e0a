"""Workers that are asked what they offer compute some experts, and are free again afterwards."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixchat.base.errors import MixchatError
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.loading.served_experts import load_served_experts
from mixchat.loading.workers import ask_workers
from mixchat.planning.worker_split import WorkerOffer
from mixchat.weights.format.installed_model import InstalledModel

sys.path.insert(0, str(Path(__file__).parents[1] / "experts" / "workers"))
from worker_double import KEY, ThreadedWorker

SLOTS = 3


@pytest.fixture
def worker(tiny_model: Path) -> Iterator[ThreadedWorker]:
    with InstalledModel(tiny_model) as model:
        budget = MemoryBudget(size=SLOTS * model.blueprint.expert.stride)
    options = LoadOptions(host_memory=budget, device="cpu")
    threaded = ThreadedWorker(load_served_experts(tiny_model, options, lambda line: None))
    yield threaded
    threaded.stop()


@pytest.fixture
def options(tmp_path: Path) -> LoadOptions:
    key_file = tmp_path / "worker.key"
    key_file.write_text(KEY.hex())
    key_file.chmod(0o600)
    return LoadOptions(key_file=key_file)


def ask(model: Path, options: LoadOptions, *addresses: object) -> list[WorkerOffer]:
    named = LoadOptions(key_file=options.key_file, workers=tuple(map(str, addresses)))
    with InstalledModel(model) as installed:
        return ask_workers(installed, named)


def test_a_worker_says_its_room_and_is_timed(tiny_model, worker, options):
    for count in (1, 2):
        (offer,) = ask(tiny_model, options, worker.address)
        assert (offer.address, offer.slots) == (str(worker.address), SLOTS)
        assert 0 < offer.expert_seconds < 10
        assert 0 < offer.round_trip < 10
        worker.wait_for_note("the chat ends", count)


def test_a_worker_that_cannot_be_asked_is_an_error_and_the_others_are_free(
    tiny_model, worker, options
):
    with pytest.raises(MixchatError, match="no worker can be reached there"):
        ask(tiny_model, options, worker.address, "127.0.0.1:1")
    worker.wait_for_note("the chat ends")
    assert ask(tiny_model, options) == []
