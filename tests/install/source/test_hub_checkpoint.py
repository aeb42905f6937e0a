"""Shards on the hub: where they go, what is used of the cache, and what is left at the end."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from fake_hub import COMMIT, REPO, FakeHub
from safetensors.torch import load_file
from weight_tools import Bar, shard_names

from mixchat.base.errors import HubError
from mixchat.install.source import hub, hub_checkpoint
from mixchat.install.source.checkpoint import CheckpointReader
from mixchat.install.source.hub_checkpoint import HubCheckpoint
from mixchat.install.source.transfer import part_path
from mixchat.weights.format.manifest import Source

SHARDS = shard_names(2)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def origin_for(target: Path, **how: bool) -> HubCheckpoint:
    remote = hub.look_up(REPO)
    return HubCheckpoint(remote, Source(REPO, remote.commit), target, **how)


def bring(checkpoint: HubCheckpoint, shard: str = SHARDS[0], bar: Bar | None = None) -> Path:
    return checkpoint.fetch(shard, bar or Bar(), Event())


def blob(cache: Path, fake: FakeHub, shard: str = SHARDS[0]) -> Path:
    sha256 = fake.describe(shard)["lfs"]["sha256"]
    return cache / "models--org--tiny-mixtral" / "blobs" / sha256


def asked(fake: FakeHub, shard: str = SHARDS[0]) -> list[str | None]:
    """Return the ranges requested of a shard, but for those of the headers."""
    found = [r.range for r in fake.requests if r.where == "store" and r.path[1:] == shard]
    return [text for text in found if text is None or not text.startswith("bytes=0-")]


class TestBesideTheModel:
    def test_a_shard_is_there_until_it_is_released(self, fake, target):
        checkpoint = origin_for(target)
        bar = Bar()
        size = len(fake.files[SHARDS[0]])
        assert checkpoint.missing(SHARDS[0]) == checkpoint.temporary(SHARDS[0]) == size
        path = bring(checkpoint, bar=bar)
        assert path == target / "source" / SHARDS[0]
        assert path.read_bytes() == fake.files[SHARDS[0]]
        assert (bar.done, checkpoint.missing(SHARDS[0])) == (size, 0)
        checkpoint.release(SHARDS[0])
        assert not list((target / "source").iterdir())

    @pytest.mark.parametrize("keep_source", [False, True])
    def test_what_another_process_left_is_resumed(self, fake, target, cache, keep_source):
        (target / "source").mkdir(parents=True)
        part_path(target / "source" / SHARDS[0]).write_bytes(fake.files[SHARDS[0]][:100_000])
        checkpoint, bar = origin_for(target, keep_source=keep_source), Bar()
        missing = checkpoint.missing(SHARDS[0])
        assert missing == len(fake.files[SHARDS[0]]) - 100_000
        path = bring(checkpoint, bar=bar)
        assert path.read_bytes() == fake.files[SHARDS[0]]
        assert (path.resolve() == blob(cache, fake)) == keep_source
        assert bar.done == missing
        assert asked(fake) == ["bytes=100000-"]

    def test_a_whole_one_that_was_left_is_hashed_and_not_requested(self, fake, target):
        bring(origin_for(target))
        fake.requests.clear()
        checkpoint = origin_for(target)
        assert bring(checkpoint).exists()
        assert asked(fake) == []
        (target / "source" / SHARDS[0]).write_bytes(bytes(len(fake.files[SHARDS[0]])))
        with pytest.raises(HubError, match=SHARDS[0]):
            bring(checkpoint)

    def test_the_release_of_one_does_not_take_the_directory_from_the_next(
        self, fake, target, monkeypatch
    ):
        """Made by one thread, and removed by the other since it was still empty."""
        checkpoint, mkdir = origin_for(target), Path.mkdir

        def raced(path: Path, *how: object, **more: object) -> None:
            mkdir(path, *how, **more)  # type: ignore[arg-type]
            if path.name == "source":
                checkpoint.release(SHARDS[1])

        monkeypatch.setattr(Path, "mkdir", raced)
        assert bring(checkpoint).read_bytes() == fake.files[SHARDS[0]]


class TestRate:
    def test_tries_for_a_while_and_keeps_what_came_for_the_fetch(self, fake, target, monkeypatch):
        monkeypatch.setattr(hub_checkpoint, "_PROBE_S", 0.2)
        fake.delay, fake.step = 0.05, 70_000  # headers come in one piece
        checkpoint, whole = origin_for(target), len(fake.files[SHARDS[0]])
        rate = checkpoint.rate(SHARDS, keep=True)
        assert rate is not None
        assert rate > 0
        came = whole - checkpoint.missing(SHARDS[0])
        assert 0 < came < whole
        fake.delay, bar = 0.0, Bar()
        assert bring(checkpoint, bar=bar).read_bytes() == fake.files[SHARDS[0]]
        assert bar.done == whole - came
        assert asked(fake) == [None, f"bytes={came}-"]

    def test_keeps_nothing_where_it_is_only_asked(self, fake, target):
        checkpoint = origin_for(target)
        rate = checkpoint.rate(SHARDS, keep=False)
        assert rate is not None
        assert rate > 0
        assert not target.exists()

    @pytest.mark.parametrize(
        ("fault", "keep"), [({"cut_after": 0}, True), ({"status": 503}, False)]
    )
    def test_a_lost_connection_meanwhile_is_no_failure(self, fake, target, fault, keep):
        """Everything else is requested again; a plan failed at the first hiccup."""
        checkpoint = origin_for(target)
        fake.fail(f"^/{SHARDS[0]}", times=1, **fault)
        checkpoint.rate(SHARDS, keep=keep)
        assert bring(checkpoint).read_bytes() == fake.files[SHARDS[0]]


class TestKeepSource:
    def test_leaves_a_cache_that_the_hubs_own_client_reads(self, fake, target, cache):
        from huggingface_hub import hf_hub_download, scan_cache_dir

        checkpoint = origin_for(target, keep_source=True)
        checkpoint.companions()
        for shard in SHARDS:
            path = bring(checkpoint, shard)
            found = hf_hub_download(REPO, shard, revision=COMMIT, local_files_only=True)
            assert Path(found) == path
            checkpoint.release(shard)
            assert path.read_bytes() == fake.files[shard]
            assert checkpoint.temporary(shard) == 0
        report = scan_cache_dir(cache)
        assert not report.warnings
        assert report.size_on_disk == sum(map(len, fake.files.values()))
        checkpoint.close()
        assert not target.exists()

    def test_a_blob_that_another_revision_brought_is_used(self, fake, target):
        bring(origin_for(target, keep_source=True))
        fake.commit = "d" * 40
        fake.requests.clear()
        path = bring(origin_for(target, keep_source=True))
        assert path.parent.name == "d" * 40
        assert path.read_bytes() == fake.files[SHARDS[0]]
        assert asked(fake) == []

    def test_a_disk_of_its_own_for_the_cache_is_filled_by_copies(self, fake, target, monkeypatch):
        checkpoint, rename = origin_for(target, keep_source=True), os.rename

        def on_one_disk(source: Path, goal: Path) -> None:
            if "source" in str(source):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            rename(source, goal)

        monkeypatch.setattr(os, "rename", on_one_disk)
        monkeypatch.setattr(hub_checkpoint, "same_disk", lambda *_: False)
        assert checkpoint.temporary(SHARDS[0]) == len(fake.files[SHARDS[0]])
        path = bring(checkpoint)
        assert path.read_bytes() == fake.files[SHARDS[0]]
        assert [file.name for file in path.resolve().parent.iterdir()] == [path.resolve().name]
        assert not list((target / "source").iterdir())


class TestCache:
    @pytest.fixture
    def cached(self, fake: FakeHub, tmp_path: Path) -> Path:
        """A shard that another tool put into the cache."""
        return bring(origin_for(tmp_path / "other", keep_source=True))

    def test_what_is_there_is_used_and_stays(self, fake, target, cached):
        checkpoint = origin_for(target)
        fake.requests.clear()
        assert checkpoint.missing(SHARDS[0]) == checkpoint.temporary(SHARDS[0]) == 0
        assert bring(checkpoint).resolve() == cached.resolve()
        checkpoint.release(SHARDS[0])
        assert cached.read_bytes() == fake.files[SHARDS[0]]
        assert asked(fake) == []

    @pytest.mark.parametrize(
        "damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-1]]
    )
    @pytest.mark.parametrize("keep_source", [False, True])
    def test_what_is_damaged_there_is_found_and_fetched_again(
        self, fake, target, cached, damage, keep_source
    ):
        good = fake.files[SHARDS[0]]
        bad = damage(good)
        cached.resolve().write_bytes(bad)
        assert bring(origin_for(target, keep_source=keep_source)).read_bytes() == good
        assert cached.is_symlink()
        assert cached.read_bytes() == (good if keep_source else bad)

    @pytest.mark.parametrize(
        ("lie", "keep_source"), [({"sha256": "0" * 64}, False), ({"size": 7}, True)]
    )
    def test_what_is_good_there_stays_whatever_the_hub_lists(
        self, fake, target, cached, lie, keep_source
    ):
        """A listing with another hash had a shard of 5 GB removed from the cache."""
        remote = hub.look_up(REPO)
        remote.shards[SHARDS[0]] = replace(remote.shards[SHARDS[0]], **lie)
        source = Source(REPO, remote.commit)
        checkpoint = HubCheckpoint(remote, source, target, keep_source=keep_source)
        with pytest.raises(HubError):
            bring(checkpoint)
        assert cached.is_symlink()
        assert cached.read_bytes() == fake.files[SHARDS[0]]

    @pytest.mark.parametrize("keep_source", [False, True])
    def test_what_has_the_name_of_a_shard_but_other_bytes_is_left_alone(
        self, fake, target, cached, keep_source
    ):
        cached.unlink()
        cached.write_bytes(bytes(len(fake.files[SHARDS[0]])))
        path = bring(origin_for(target, keep_source=keep_source))
        assert path.read_bytes() == fake.files[SHARDS[0]]
        assert cached.read_bytes() == bytes(len(fake.files[SHARDS[0]]))

    @pytest.mark.parametrize("keep_source", [False, True])
    def test_a_cache_without_links_is_used_too(self, fake, target, cached, keep_source):
        blob = cached.resolve()
        cached.unlink()
        blob.rename(cached)
        fake.requests.clear()
        assert bring(origin_for(target, keep_source=keep_source)) == cached
        assert asked(fake) == []


class TestReading:
    def test_a_tensor_comes_by_its_range_alone(self, fake, target, two_shards):
        checkpoint = origin_for(target)
        fake.requests.clear()
        header = checkpoint.index.header(SHARDS[0])
        tensors = load_file(two_shards / SHARDS[0])
        name = header.specs[3].name
        with CheckpointReader(checkpoint) as readers:
            assert torch.equal(readers.read(name), tensors[name])
        start = header.start(name)
        assert asked(fake) == [f"bytes={start}-{start + header.spec(name).nbytes - 1}"]

    def test_one_in_the_cache_is_not_requested(self, fake, target, tmp_path):
        bring(origin_for(tmp_path / "other", keep_source=True))
        checkpoint = origin_for(target)
        fake.requests.clear()
        with CheckpointReader(checkpoint) as readers:
            readers.read(checkpoint.index.header(SHARDS[0]).specs[0].name)
        assert not fake.requests


def test_a_checkpoint_leaves_its_shards_alone_and_nothing_in_hugging_faces_cache(
    fake, target, cache
):
    """3.5 MB of a tokenizer stayed there, although all data is said to be in one directory."""
    fake.files["tokenizer.json"] = json.dumps({"a": 1}).encode()
    checkpoint = origin_for(target)
    directory = checkpoint.companions()
    for name in ("tokenizer.json", "config.json"):
        assert (directory / name).read_bytes() == fake.files[name]
    assert not [path for path in directory.iterdir() if path.suffix == ".safetensors"]
    bring(checkpoint)
    checkpoint.close()
    assert not cache.exists()
    assert [path.name for path in (target / "source").iterdir()] == [SHARDS[0]]
