"""A model of sixteen experts, read in small pieces."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from source_tools import KEYS, LAYERS, digest, whole

from mixchat.experts import store
from mixchat.experts.cache import ExpertKey
from mixchat.weights.format.installed_model import InstalledModel


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PIECE", 4096)


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
