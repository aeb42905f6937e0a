"""Only the damaged parts of an installed model are rebuilt, from its source and to the byte."""

import os
import random
import shutil
from pathlib import Path

import pytest
from care_tools import EXPERTS, SHARED, flip, mend, verify
from fake_hub import COMMIT
from safetensors.torch import load_file, save_file
from weight_tools import Meter, files_of

from mixchat.base.errors import CheckpointError, HubError
from mixchat.base.progress import NoProgress
from mixchat.base.safetensors import SafetensorsFile
from mixchat.install.care.repair import repair
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.install.source.open_checkpoint import open_checkpoint
from mixchat.weights.format.manifest import (
    MANIFEST_COPY,
    MANIFEST_FILE,
    Source,
    read_either_manifest,
)


class TestRepair:
    @pytest.mark.parametrize("name", [SHARED, EXPERTS, "experts-001.safetensors"])
    def test_flipped_bytes_are_made_again(self, installed, made, two_shards, name):
        size, draw = (installed / name).stat().st_size, random.Random(name)
        for offset in (0, 9, *(draw.randrange(size) for _ in range(6))):
            flip(installed / name, offset)
        mend(installed, two_shards)
        assert files_of(installed) == files_of(made)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda installed: os.truncate(installed / EXPERTS, 5_000),
            lambda installed: os.truncate(installed / SHARED, 0),
            lambda installed: os.truncate(installed / SHARED, 10_000_000),
            lambda installed: (installed / EXPERTS).unlink(),
            lambda installed: [
                (installed / name).unlink() for name in (SHARED, EXPERTS, "config.json")
            ],
            lambda installed: (installed / "config.json").write_bytes(b"{}"),
            lambda installed: (installed / "generation_config.json").unlink(),
            lambda installed: (installed / MANIFEST_FILE).write_bytes(b"junk"),
            lambda installed: (installed / MANIFEST_COPY).unlink(),
            lambda installed: [
                flip(installed / name, -1) for name in (MANIFEST_FILE, SHARED, EXPERTS)
            ],
            lambda installed: [flip(installed / name, 60) for name in ("config.json", EXPERTS)],
            lambda installed: None,
        ],
    )
    def test_whatever_happened_the_same_bytes_come_back(self, installed, made, two_shards, damage):
        damage(installed)
        mend(installed, two_shards)
        assert files_of(installed) == files_of(made)
        assert verify(installed) == []

    def test_only_what_is_damaged_is_read_and_the_bar_says_how_much(
        self, installed, two_shards, monkeypatch
    ):
        flip(installed / EXPERTS, -5000)
        read, names = SafetensorsFile.read, []
        monkeypatch.setattr(
            SafetensorsFile, "read", lambda file, name: names.append(name) or read(file, name)
        )
        meter = Meter()
        opened = DirectoryCheckpoint(two_shards, Source("x"))
        repair(installed, verify(installed), opened, meter)
        assert names == ["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
        bar = meter.bar("repairing")
        assert 0 < bar.done == bar.total < (installed / EXPERTS).stat().st_size

    def test_a_source_that_changed_is_refused_and_nothing_is_overwritten(
        self, installed, two_shards, tmp_path
    ):
        changed = Path(shutil.copytree(two_shards, tmp_path / "changed"))
        for path in changed.glob("*.safetensors"):
            save_file({name: tensor * 2 for name, tensor in load_file(path).items()}, path)
        flip(installed / EXPERTS, -1)
        before = files_of(installed)
        with pytest.raises(CheckpointError, match=r"model-0000\d-of-00002.safetensors is not what"):
            mend(installed, changed)
        assert files_of(installed) == before

    def test_a_small_file_that_changed_at_the_source_is_refused(
        self, installed, two_shards, tmp_path
    ):
        changed = Path(shutil.copytree(two_shards, tmp_path / "changed"))
        (changed / "generation_config.json").write_text("{}")
        (installed / "generation_config.json").unlink()
        with pytest.raises(CheckpointError, match="no longer gives the bytes"):
            mend(installed, changed)


class TestRepairFromTheHub:
    def mend(self, installed: Path) -> None:
        damages = verify(installed)
        source = read_either_manifest(installed).source
        with open_checkpoint(source, installed, NoProgress()) as opened:
            repair(installed, damages, opened, NoProgress())

    def test_asks_only_for_the_ranges_that_are_needed(self, installed, made, fake, two_shards):
        flip(installed / EXPERTS, -5000)
        flip(installed / SHARED, 4096)
        self.mend(installed)
        assert files_of(installed) == files_of(made)
        index = DirectoryCheckpoint(two_shards, Source("x")).index
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

    def test_takes_the_commit_it_was_made_of_though_the_branch_moved(self, installed, made, fake):
        flip(installed / EXPERTS, -5000)
        self.mend(installed)
        assert [path for path in fake.got("hub") if path.endswith(f"/revision/{COMMIT}")]

    def test_may_be_repeated_after_a_failure(self, installed, made, fake, two_shards):
        for name in (EXPERTS, SHARED):
            os.truncate(installed / name, 20_000)
        fake.fail("^/model-", times=2)
        fake.fail("^/model-", times=40, status=403)
        with pytest.raises(HubError):
            self.mend(installed)
        fake.faults.clear()
        self.mend(installed)
        assert files_of(installed) == files_of(made)
