"""Checkpoints cut into shards, checkpoints that fail or count, and a progress that adds up."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mixchat.base.progress import Task
from mixchat.install.make.download import DownloadRequest, download
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.parts import ModelPart
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.models import resolve
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.weights.format.manifest import Source
from mixchat.weights.format.workspace import SOURCE_DIR, workspace

Place = Callable[[str], int]


def shard_names(count: int) -> list[str]:
    return [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]


def snapshot_dir(repo: str, commit: str) -> Path:
    """Return the directory with a commit's files in Hugging Face's cache."""
    from huggingface_hub import constants

    name = "models--" + repo.replace("/", "--")
    return Path(constants.HF_HUB_CACHE) / name / "snapshots" / commit


def shard(checkpoint: Path, target: Path, place: Place | int) -> Path:
    """A copy of a checkpoint of one file, cut up: `place` gives a tensor's shard.

    A number deals the tensors out to so many shards in turn, so that every expert spans several.
    """
    tensors = load_file(checkpoint / "model.safetensors")
    if isinstance(place, int):
        count, order = place, sorted(tensors)
        numbers = {name: number % count for number, name in enumerate(order)}
    else:
        numbers = {name: place(name) for name in tensors}
    names = shard_names(max(numbers.values()) + 1)
    target.mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.name != "model.safetensors":
            shutil.copy(path, target)
    for number, file in enumerate(names):
        save_file({n: t for n, t in tensors.items() if numbers[n] == number}, target / file)
    weight_map = {name: names[number] for name, number in numbers.items()}
    index = json.dumps({"weight_map": weight_map})
    (target / "model.safetensors.index.json").write_text(index)
    return target


def files_of(directory: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def write_files(directory: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    return directory


def quantize(
    checkpoint: Path, target: Path, options: QuantizeOptions | None = None, **how: Any
) -> None:
    """Make an installed model of a directory, as `download` does."""
    opened = DirectoryCheckpoint(checkpoint, Source("org/repo", "c0ffee"))
    CheckpointBuild(opened, target, make_blueprint(opened.index, options or QuantizeOptions())).run(
        **how
    )


class Bar:
    """A `Task`; `stop_after` bytes it is Ctrl-C."""

    def __init__(
        self, what: str = "", total: int = 0, done: int = 0, stop_after: float = float("inf")
    ) -> None:
        self.what, self.total, self.done, self.first = what, total, done, done
        self.closed = False
        self.stop_after = stop_after

    def advance(self, amount: int) -> None:
        self.done += amount
        if self.done > self.stop_after:
            raise KeyboardInterrupt

    def close(self) -> None:
        self.closed = True


class Meter:
    """A `Progress` that remembers its bars and its notes."""

    def __init__(self) -> None:
        self.bars: list[Bar] = []
        self.notes: list[str] = []

    def task(self, what: str, total: int, done: int = 0) -> Bar:
        self.bars.append(Bar(what, total, done))
        return self.bars[-1]

    def note(self, text: str) -> None:
        self.notes.append(text)

    def bar(self, what: str) -> Bar:
        """The only bar with this beginning."""
        (found,) = [bar for bar in self.bars if bar.what.startswith(what)]
        return found


class Fetching(DirectoryCheckpoint):
    """A directory that behaves like a hub: shards are copied to `place` and removed on release."""

    def __init__(self, directory: Path, place: Path) -> None:
        super().__init__(directory, Source("org/repo", "c0ffee"))
        self.place = place
        self.fetched: list[str] = []
        self.released: list[str] = []
        self.fail_at: str | None = None
        self.arrived: dict[str, Event] = {name: Event() for name in self.index.shards}

    def missing(self, shard: str) -> int:
        return 0 if (self.place / shard).exists() else self.temporary(shard)

    def temporary(self, shard: str) -> int:
        return self.index.header(shard).size

    def fetch(self, shard: str, task: Task, stop: Event) -> Path:
        if shard == self.fail_at:
            raise ConnectionError(f"no {shard}")
        self.place.mkdir(exist_ok=True, parents=True)
        if not (self.place / shard).exists():
            self.fetched.append(shard)
            shutil.copy(super().fetch(shard, task, stop), self.place / shard)
            task.advance(self.temporary(shard))
        self.arrived[shard].set()
        return self.place / shard

    def release(self, shard: str) -> None:
        self.released.append(shard)
        (self.place / shard).unlink(missing_ok=True)


def order_of(names: Sequence[str]) -> Callable[[str], int]:
    """Give each tensor the number of the first of these fragments that its name contains."""

    def place(tensor: str) -> int:
        return next((n for n, fragment in enumerate(names) if fragment in tensor), len(names))

    return place


class Making:
    """Counts the parts that are made; raises instead of making the one numbered `fail_at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.fail_at: int | None = None
        make = ModelPart.make

        def counted(part: ModelPart, *arguments: object) -> object:
            if len(self.names) == self.fail_at:
                raise ConnectionError("stopped")
            self.names.append(f"{part.file} {part.tensors[0].name}")
            return make(part, *arguments)

        monkeypatch.setattr(ModelPart, "make", counted)

    def again(self, fail_at: int | None = None) -> None:
        self.names, self.fail_at = [], fail_at


def fetching(checkpoint: Path, target: Path) -> Fetching:
    return Fetching(checkpoint, workspace(target) / SOURCE_DIR)


def run(
    opened: Fetching, target: Path, options: QuantizeOptions | None = None, ahead: bool = True
) -> Meter:
    meter = Meter()
    blueprint = make_blueprint(opened.index, options or QuantizeOptions())
    build = CheckpointBuild(opened, target, blueprint)
    build.ahead = ahead
    build.run(meter)
    return meter


def leave_unfinished(checkpoint: Path, target: Path) -> Fetching:
    """Begin a model of a checkpoint in shards, of which the last one does not come."""
    opened = fetching(checkpoint, target)
    opened.fail_at = opened.index.shards[-1]
    with pytest.raises(ConnectionError):
        run(opened, target)
    return opened


# Files of a person, with names that are nearly mixchat's.
FOREIGN = {
    "thesis.txt": b"years",
    "thesis.tmp": b"days",
    "shared.safetensors.tmp": b"days",
    "experts-000.safetensors.new": b"hours",
    "mixchat.json.tmp": b"minutes",
    "journal.jsonl": b'{"monday": "wrote"}\n',
    "aside-notes.txt": b"notes",
    "mixchat.txt": b"about mixchat",
    "source/config.json": b"{}",
    "source/model-00001-of-00002.safetensors": b"weights",
    "build/checkpoint/model.safetensors": b"weights",
    "expert-inputs/selected-000": b"mine",
}
NF4 = QuantizeOptions()


def get(
    name: str,
    *,
    key: str | None = None,
    options: QuantizeOptions = NF4,
    meter: Meter | None = None,
    **how: Any,
) -> Path:
    return download(DownloadRequest(resolve(name, key=key), options, **how), meter or Meter())


def left_in(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*"))
