"""A model of sixteen experts, read in small steps."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from source_tools import KEYS, LAYERS, digest, whole

from mixchat.experts import sources
from mixchat.experts.cache import ExpertKey
from mixchat.weights.format.installed_model import InstalledModel


@pytest.fixture(scope="module", autouse=True)
def small_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "STEP", 4096)
        yield


@pytest.fixture(scope="module")
def directory(make_checkpoint: Callable[..., Path], install: Callable[..., Path]) -> Path:
    """A model of sixteen experts. Do not write into it."""
    return install(make_checkpoint(num_hidden_layers=LAYERS))


@pytest.fixture(scope="module")
def installed(directory: Path) -> Iterator[InstalledModel]:
    with InstalledModel(directory) as installed:
        yield installed


@pytest.fixture(scope="module")
def truth(installed: InstalledModel) -> dict[ExpertKey, str]:
    """The digest of every expert's bytes, each read in one go."""
    digests = {key: digest(whole(installed, key)) for key in KEYS}
    assert len(set(digests.values())) == len(KEYS)
    return digests


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks on the CPU pass for blocks elsewhere: they are on `cpu`, which is not `cpu:0`."""
    monkeypatch.setattr(sources, "CPU", torch.device("cpu:0"))
