"""A checkpoint on a hub: the real client against a hub on this machine."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, LIES, REPO, FakeHub
from weight_tools import shard_names, snapshot_dir

from mixchat.base.errors import CheckpointError, HubError, ModelNotFoundError
from mixchat.install.source import hub
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.install.source.checkpoint_index import INDEX
from mixchat.install.source.remote_file import RemoteFile
from mixchat.weights.format.manifest import Source

SHARDS = shard_names(2)
PICKLE = b"pickle" * 1_000
UNWANTED = {
    "README.md": b"# Mixtral",
    "adapter_model.safetensors": PICKLE,
    "consolidated.safetensors": PICKLE,
    "consolidated.00.pt": PICKLE,
    "pytorch_model.bin": PICKLE,
    "modeling_evil.py": b"import os",
    "original/model.safetensors": PICKLE,
    "original/config.json": b"{}",
}


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def an_index(*shards: Any) -> bytes:
    return as_json({"weight_map": {f"tensor{n}": shard for n, shard in enumerate(shards)}})


@pytest.fixture
def fake(fake: FakeHub) -> FakeHub:
    """A repo as Mixtral's: shards, the small files, and much that must not be fetched."""
    fake.files |= {"tokenizer.model": b"x" * 3_000, "tokenizer.json": b"{}"} | UNWANTED
    return fake


def with_config(fake: FakeHub, **changes: Any) -> bytes:
    return as_json(json.loads(fake.files["config.json"]) | changes)


def wanted(fake: FakeHub) -> set[str]:
    return set(fake.files) - set(UNWANTED)


class TestPlan:
    def test_names_the_commit_and_only_the_files_that_are_wanted(self, fake):
        remote = hub.look_up(REPO)
        assert remote.commit == COMMIT
        assert {file.path for file in remote.small} | set(remote.shards) == wanted(fake)
        assert list(remote.shards) == SHARDS
        assert remote.index.config.num_local_experts == 4
        for name, file in remote.shards.items():
            assert file.sha256 == fake.describe(name)["lfs"]["sha256"]
            assert file.size == len(fake.files[name])

    def test_knows_every_tensor_from_the_headers_alone(self, fake, two_shards):
        remote, local = hub.look_up(REPO), DirectoryCheckpoint(two_shards, Source("x")).index
        for shard in SHARDS:
            assert remote.index.header(shard).specs == local.header(shard).specs
        asked = [r for r in fake.requests if r.where == "store" and r.path[1:] in SHARDS]
        assert {request.range for request in asked} == {f"bytes=0-{hub._FIRST_READ_BYTES - 1}"}
        assert len(asked) == len(SHARDS)

    @pytest.mark.parametrize("ranges", [True, False])
    def test_reads_a_header_that_is_longer_than_the_first_range(self, fake, monkeypatch, ranges):
        whole = hub.look_up(REPO)
        monkeypatch.setattr(hub, "_FIRST_READ_BYTES", 100)
        fake.ranges = ranges
        assert (
            hub.look_up(REPO).index.header(SHARDS[1]).specs == whole.index.header(SHARDS[1]).specs
        )

    @pytest.mark.parametrize("served", [b"<html>please log in</html>", b'{"error": "try later"}'])
    def test_asks_again_where_something_else_came_in_place_of_a_header(self, fake, served):
        """A page to log in was called a damaged checkpoint, with exit code 6, at the first try."""
        fake.serve[SHARDS[1]] = served
        with pytest.raises(HubError, match="something else in place of") as caught:
            hub.look_up(REPO)
        assert "log in" in (caught.value.hint or "")
        assert len([path for path in fake.got("store") if SHARDS[1] in path]) == 6
        fake.serve.clear()
        fake.fail(f"^/{SHARDS[1]}", times=2, page=True)
        assert set(hub.look_up(REPO).shards) == set(SHARDS)

    @pytest.mark.parametrize("lie", ["page", "json", "zeros"])
    def test_a_header_that_the_hub_makes_up_is_no_damaged_checkpoint(self, fake, lie):
        """A page of HTML as a part of the file, with 206 and its range, exited with 6."""
        fake.fail(f"^/{SHARDS[1]}", lie=lie, ranged=True)
        with pytest.raises(HubError, match=f"something else in place of .*{SHARDS[1]}"):
            hub.look_up(REPO)

    def test_finds_a_wrong_shape_before_any_weights(self, fake):
        fake.files["config.json"] = with_config(fake, vocab_size=98)
        with pytest.raises(CheckpointError, match=r"has the shape .*config\.json asks for"):
            hub.look_up(REPO)

    @pytest.mark.parametrize(
        "start",
        [b"", struct.pack("<Q", 2**60), struct.pack("<Q", 2) + b"[]"],
    )
    def test_refuses_a_shard_that_is_no_safetensors_file(self, fake, start):
        fake.files[SHARDS[0]] = start + b" " * 5_000
        with pytest.raises(HubError, match=f"in place of .*{SHARDS[0]}") as caught:
            hub.look_up(REPO)
        assert "damaged" in str(caught.value.hint)

    def test_refuses_a_shard_without_a_hash(self, fake):
        fake.files[SHARDS[0]] = b"small"
        with pytest.raises(CheckpointError, match="no SHA-256"):
            hub.look_up(REPO)

    def test_refuses_a_shard_too_large_for_http(self, fake, monkeypatch):
        monkeypatch.setattr(hub, "_SHARD_BYTES_MAX", 80_000)
        with pytest.raises(CheckpointError, match="too large") as caught:
            hub.look_up(REPO)
        assert "hf download" in (caught.value.hint or "")

    def test_asks_for_the_revision_that_is_named(self, fake):
        assert hub.look_up(REPO, COMMIT).commit == COMMIT
        with pytest.raises(ModelNotFoundError, match="no such revision"):
            hub.look_up(REPO, "no-such-branch")

    def test_refuses_another_architecture_before_any_weights(self, fake):
        fake.files["config.json"] = with_config(fake, model_type="llama")
        with pytest.raises(CheckpointError, match="does not run"):
            hub.look_up(REPO)
        assert not [path for path in fake.got() if path.endswith((".safetensors", ".index.json"))]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({INDEX: None}, "only pickled weights"),
            (dict.fromkeys([INDEX, *SHARDS, *UNWANTED]), "no weights"),
            ({"config.json": None}, "no config.json"),
            ({SHARDS[1]: None}, "names model-00002"),
            ({INDEX: b"{"}, "cannot be read"),
            ({INDEX: an_index("original/model.safetensors")}, "no shard"),
            ({INDEX: an_index("consolidated.safetensors")}, "no shard"),
        ],
    )
    def test_refuses_what_is_no_checkpoint(self, fake, change, message):
        fake.lfs_limit = 10**9
        for name, data in change.items():
            if data is None:
                del fake.files[name]
            else:
                fake.files[name] = data
        with pytest.raises(CheckpointError, match=message) as caught:
            hub.look_up(REPO)
        assert "\n" not in str(caught.value)
        assert not [path for path in fake.got() if path.endswith((".pt", ".bin", ".safetensors"))]

    def test_refuses_a_config_of_absurd_size_unread(self, fake):
        fake.listing = lambda answer: _resized(answer, "config.json", 10**10)
        with pytest.raises(CheckpointError, match="too large"):
            hub.look_up(REPO)
        assert len(fake.requests) == 1

    @pytest.mark.parametrize(
        "edit",
        [
            lambda answer: b"<html>please log in</html>",
            lambda answer: {**answer, "sha": "../../../etc"},
            lambda answer: {**answer, "siblings": [{"rfilename": None}]},
            lambda answer: _resized(answer, "config.json", -1),
            lambda answer: _rehashed(answer, "../../../../tmp/evil"),
        ],
    )
    def test_does_not_believe_a_malformed_answer(self, fake, edit):
        fake.listing = edit
        with pytest.raises(HubError, match="is not valid"):
            hub.look_up(REPO)


def _resized(answer: dict[str, Any], name: str, size: int | None) -> dict[str, Any]:
    for sibling in answer["siblings"]:
        if sibling["rfilename"] == name:
            sibling["size"] = size
    return answer


def _rehashed(answer: dict[str, Any], sha256: str) -> dict[str, Any]:
    for sibling in answer["siblings"]:
        if "lfs" in sibling:
            sibling["lfs"]["sha256"] = sha256
    return answer


class TestSmallFiles:
    def small(self, fake: FakeHub, name: str) -> RemoteFile:
        described = fake.describe(name)
        sha256 = described.get("lfs", {}).get("sha256")
        git = None if sha256 else described["blobId"]
        return RemoteFile(REPO, COMMIT, name, described["size"], sha256, git)

    def cached(self, cache: Path, name: str, data: bytes) -> Path:
        """Put a file into the cache, as another tool does."""
        path = snapshot_dir(REPO, COMMIT) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        return path

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
    def test_come_from_the_cache_where_they_are_undamaged(self, fake, cache, name):
        file = self.small(fake, name)
        assert hub.fetch_small(file) == fake.files[name]
        assert not cache.exists()
        self.cached(cache, name, fake.files[name])
        before = len(fake.requests)
        assert hub.fetch_small(file) == fake.files[name]
        assert len(fake.requests) == before

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
    @pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"?" + data[1:]])
    def test_that_are_damaged_in_the_cache_are_fetched_and_left_there(
        self, fake, cache, name, damage
    ):
        path = self.cached(cache, name, damage(fake.files[name]))
        assert hub.fetch_small(self.small(fake, name)) == fake.files[name]
        assert path.read_bytes() == damage(fake.files[name])

    @pytest.mark.parametrize("lie", [*LIES])
    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
    def test_that_are_not_those_listed_are_refused(self, fake, name, lie):
        """Some are told only by git's SHA-1, or by the SHA-256 of a large file."""
        fake.fail(f"/{name}$", lie=lie)
        with pytest.raises(HubError):
            hub.fetch_small(self.small(fake, name))
        fake.faults.clear()
        assert hub.fetch_small(self.small(fake, name)) == fake.files[name]
