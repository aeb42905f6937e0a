"""What is damaged of a kept model is made again from its source, to the byte, and nothing else."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub
from safetensors.torch import load_file, save_file
from weight_tools import Meter, files_of

from mixchat.errors import CheckpointError, HubError
from mixchat.progress import NoProgress
from mixchat.safetensors import SafetensorsFile
from mixchat.weights.care.verify import Damage, repair
from mixchat.weights.care.verify import verify as verify_model
from mixchat.weights.format.manifest import (
    MANIFEST_COPY,
    MANIFEST_FILE,
    Source,
    read_either_manifest,
    restore_manifests,
)
from mixchat.weights.source.open_origin import open_origin
from mixchat.weights.source.origin import LocalOrigin

EXPERTS = "experts-000.safetensors"
SHARED = "shared.safetensors"


@pytest.fixture
def kept(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "kept"))


def verify(directory: Path) -> list[Damage]:
    return verify_model(directory, NoProgress())


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def mend(directory: Path, checkpoint: Path) -> None:
    damages = verify(directory)
    restore_manifests(directory)
    repair(directory, damages, LocalOrigin(checkpoint, Source(str(checkpoint))), NoProgress())


class TestRepair:
    @pytest.mark.parametrize("name", [SHARED, EXPERTS, "experts-001.safetensors"])
    def test_flipped_bytes_are_made_again(
        self, kept: Path, made: Path, two_shards: Path, name: str
    ) -> None:
        size, draw = (kept / name).stat().st_size, random.Random(name)
        for offset in (0, 9, *(draw.randrange(size) for _ in range(6))):
            flip(kept / name, offset)
        mend(kept, two_shards)
        assert files_of(kept) == files_of(made)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda kept: os.truncate(kept / EXPERTS, 5_000),
            lambda kept: os.truncate(kept / SHARED, 0),
            lambda kept: os.truncate(kept / SHARED, 10_000_000),
            lambda kept: (kept / EXPERTS).unlink(),
            lambda kept: [(kept / name).unlink() for name in (SHARED, EXPERTS, "config.json")],
            lambda kept: (kept / "config.json").write_bytes(b"{}"),
            lambda kept: (kept / "generation_config.json").unlink(),
            lambda kept: (kept / MANIFEST_FILE).write_bytes(b"junk"),
            lambda kept: (kept / MANIFEST_COPY).unlink(),
            lambda kept: [flip(kept / name, -1) for name in (MANIFEST_FILE, SHARED, EXPERTS)],
            lambda kept: [flip(kept / name, 60) for name in ("config.json", EXPERTS)],
            lambda kept: None,
        ],
    )
    def test_whatever_happened_the_same_bytes_come_back(
        self, kept: Path, made: Path, two_shards: Path, damage: Callable[[Path], object]
    ) -> None:
        damage(kept)
        mend(kept, two_shards)
        assert files_of(kept) == files_of(made)
        assert verify(kept) == []

    def test_only_what_is_damaged_is_read_and_the_bar_says_how_much(
        self, kept: Path, two_shards: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flip(kept / EXPERTS, -5000)
        read, names = SafetensorsFile.read, []
        monkeypatch.setattr(
            SafetensorsFile, "read", lambda file, name: names.append(name) or read(file, name)
        )
        meter = Meter()
        origin = LocalOrigin(two_shards, Source("x"))
        repair(kept, verify(kept), origin, meter)
        assert names == ["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
        bar = meter.bar("repairing")
        assert bar.done == bar.total == origin.index.nbytes(names)

    def test_a_source_that_changed_is_refused_and_nothing_is_overwritten(
        self, kept: Path, two_shards: Path, tmp_path: Path
    ) -> None:
        changed = Path(shutil.copytree(two_shards, tmp_path / "changed"))
        for path in changed.glob("*.safetensors"):
            save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
        flip(kept / EXPERTS, -1)
        before = files_of(kept)
        with pytest.raises(CheckpointError, match="no longer gives the bytes"):
            mend(kept, changed)
        assert files_of(kept) == before

    def test_a_small_file_that_changed_at_the_source_is_refused(
        self, kept: Path, two_shards: Path, tmp_path: Path
    ) -> None:
        changed = Path(shutil.copytree(two_shards, tmp_path / "changed"))
        (changed / "generation_config.json").write_text("{}")
        (kept / "generation_config.json").unlink()
        with pytest.raises(CheckpointError, match="no longer gives the bytes"):
            mend(kept, changed)


class TestRepairFromTheHub:
    def mend(self, kept: Path) -> None:
        damages = verify(kept)
        source = read_either_manifest(kept).source
        with open_origin(source, kept, NoProgress()) as origin:
            repair(kept, damages, origin, NoProgress())

    def test_asks_only_for_the_ranges_that_are_needed(
        self, kept: Path, made: Path, fake: FakeHub, two_shards: Path
    ) -> None:
        flip(kept / EXPERTS, -5000)
        flip(kept / SHARED, 4096)
        self.mend(kept)
        assert files_of(kept) == files_of(made)
        index = LocalOrigin(two_shards, Source("x")).index
        needed = set()
        for name in (
            "model.layers.0.block_sparse_moe.experts.3.w2.weight",
            "model.embed_tokens.weight",
        ):
            shard = index.shard_of(name)
            start = index.header(shard).start(name)
            needed.add((f"/{shard}", f"bytes={start}-{start + index.nbytes([name]) - 1}"))
        asked = {(r.path, r.range) for r in fake.requests if r.where == "store"}
        headers = {pair for pair in asked if str(pair[1]).startswith("bytes=0-")}
        others = {pair for pair in asked if pair[0].endswith(".index.json")}
        assert asked - headers - others == needed

    def test_takes_the_commit_it_was_made_of_though_the_branch_moved(
        self, kept: Path, made: Path, fake: FakeHub
    ) -> None:
        flip(kept / EXPERTS, -5000)
        self.mend(kept)
        assert [path for path in fake.got("hub") if path.endswith(f"/revision/{COMMIT}")]

    def test_may_be_repeated_after_a_failure(
        self, kept: Path, made: Path, fake: FakeHub, two_shards: Path
    ) -> None:
        for name in (EXPERTS, SHARED):
            os.truncate(kept / name, 20_000)
        fake.fail("^/model-", times=2)
        fake.fail("^/model-", times=40, status=403)
        with pytest.raises(HubError):
            self.mend(kept)
        fake.faults.clear()
        self.mend(kept)
        assert files_of(kept) == files_of(made)
