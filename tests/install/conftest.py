"""A data directory and a hub's cache of their own, and a hub with the tiny model."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_hub import COMMIT, REPO, FakeHub
from weight_tools import Making, files_of, quantize, shard

from mixchat.install.make import build
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.weights.format.manifest import Source


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data directory."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def two_shards(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mixtral in two shards: every expert spans both. Do not write into it."""
    return shard(tiny_checkpoint, tmp_path_factory.mktemp("sharded") / "two", 2)


@pytest.fixture
def make_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeHub]]:
    """Start a hub with these files, which HF_ENDPOINT names."""
    started: list[FakeHub] = []

    def make(source: Path, **files: bytes) -> FakeHub:
        hub = FakeHub({**files_of(source), **files}).__enter__()
        started.append(hub)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        return hub

    yield make
    for hub in started:
        hub.__exit__()


@pytest.fixture
def fake(make_hub: Callable[..., FakeHub], two_shards: Path) -> FakeHub:
    """A hub with the tiny Mixtral in two shards."""
    return make_hub(two_shards)


@pytest.fixture(scope="session")
def small(make_checkpoint: Callable[..., Path]) -> Path:
    """A Mixtral of one layer and two experts: twelve parts. Do not write into it."""
    return make_checkpoint(num_hidden_layers=1, num_local_experts=2)


@pytest.fixture(scope="session")
def whole(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the installed model of `small`, made in one go."""
    target = tmp_path_factory.mktemp("whole") / "model"
    quantize(small, target)
    return files_of(target)


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> Making:
    """Counts the parts that are made, and fails at `fail_at`."""
    return Making(monkeypatch)


@pytest.fixture
def save_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is saved after each part, not every few seconds."""
    monkeypatch.setattr(build, "_SAVE_INTERVAL_S", -1.0)


@pytest.fixture(scope="session")
def made(two_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed model of `two_shards`, as if from the hub. Do not write into it."""
    target = tmp_path_factory.mktemp("made") / "model"
    checkpoint = DirectoryCheckpoint(two_shards, Source(REPO, COMMIT))
    CheckpointBuild(checkpoint, target, make_blueprint(checkpoint.index, QuantizeOptions())).run()
    return target


@pytest.fixture
def installed(made: Path, tmp_path: Path) -> Path:
    """A copy of `made` that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "installed"))
