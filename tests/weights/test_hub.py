"""Fetching from a hub: against the real client and a hub on this machine, with its faults."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, REPO, FakeHub

from mixchat.errors import (
    CheckpointError,
    HubError,
    MixchatError,
    ModelNotFoundError,
    ResourceError,
    UsageError,
)
from mixchat.progress import NoProgress
from mixchat.weights import hub, resume

CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WANTED = {"config.json", "tokenizer.model", "tokenizer.json", hub.INDEX, *SHARDS}


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def as_json(content: Any) -> bytes:
    return json.dumps(content).encode()


def an_index(*shards: Any) -> bytes:
    return as_json({"weight_map": {f"tensor{n}": shard for n, shard in enumerate(shards)}})


def mixtral_files() -> dict[str, bytes]:
    """A repo as Mixtral's: shards, the small files, and much that must not be fetched."""
    pickle = some_bytes(5_000, seed=9)
    return {
        "config.json": as_json(CONFIG),
        "tokenizer.model": some_bytes(3_000, seed=8),
        "tokenizer.json": b"{}",
        hub.INDEX: an_index(*SHARDS),
        SHARDS[0]: some_bytes(100_000, seed=1),
        SHARDS[1]: some_bytes(50_000, seed=2),
        "README.md": b"# Mixtral",
        "adapter_model.safetensors": pickle,
        "consolidated.safetensors": pickle,
        "consolidated.00.pt": pickle,
        "pytorch_model.bin": pickle,
        "modeling_evil.py": b"import os",
        "original/model.safetensors": pickle,
        "original/config.json": b"{}",
    }


class Meter:
    """Adds up what a bar shows; `stop_after` bytes it is Ctrl-C."""

    def __init__(self, stop_after: float = float("inf")) -> None:
        self.total = self.done = 0
        self.ended = False
        self.stop_after = stop_after

    def begin(self, what: str, total: int) -> None:
        self.total = total

    def advance(self, amount: int) -> None:
        self.done += amount
        if self.done > self.stop_after:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended = True


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub's, no token, and no patience between attempts."""
    from huggingface_hub import constants

    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return tmp_path / "cache"


@pytest.fixture
def fake(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a Mixtral, which HF_ENDPOINT names."""
    with FakeHub(mixtral_files()) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        yield fake


def fetch(meter: Meter | NoProgress | None = None) -> Path:
    return hub.fetch(hub.plan(REPO), progress=meter or NoProgress())


def blob(cache: Path, data: bytes) -> Path:
    return next(cache.glob("models--*")) / "blobs" / hashlib.sha256(data).hexdigest()


class TestPlan:
    def test_names_the_commit_and_only_the_files_that_are_wanted(self, fake: FakeHub) -> None:
        remote = hub.plan(REPO)
        assert remote.commit == COMMIT
        assert {file.path for file in remote.files} == WANTED
        assert remote.total == sum(len(fake.files[name]) for name in WANTED)
        assert remote.config.num_local_experts == 4
        by_name = {file.path: file for file in remote.files}
        assert by_name[SHARDS[0]].sha256 == hashlib.sha256(fake.files[SHARDS[0]]).hexdigest()

    def test_fetches_no_weights(self, fake: FakeHub) -> None:
        remote = hub.plan(REPO)
        assert not fake.got("store")
        assert hub.missing_bytes(remote) == sum(
            len(fake.files[name]) for name in WANTED - {"config.json", hub.INDEX}
        )

    def test_takes_a_single_file_without_an_index(self, fake: FakeHub) -> None:
        del fake.files[hub.INDEX]
        fake.files["model.safetensors"] = b"weights"
        paths = {file.path for file in hub.plan(REPO).files}
        assert "model.safetensors" in paths
        assert not paths & set(SHARDS)

    def test_asks_for_the_revision_that_is_named(self, fake: FakeHub) -> None:
        assert hub.plan(REPO, COMMIT).commit == COMMIT
        with pytest.raises(ModelNotFoundError, match="no such revision"):
            hub.plan(REPO, "no-such-branch")

    def test_refuses_another_architecture_before_any_weights(self, fake: FakeHub) -> None:
        fake.files["config.json"] = as_json({**CONFIG, "model_type": "llama"})
        with pytest.raises(CheckpointError, match="not a Mixtral"):
            hub.plan(REPO)
        assert not [path for path in fake.got() if path.endswith((".safetensors", ".index.json"))]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({hub.INDEX: None}, "only pickled weights"),
            (dict.fromkeys(mixtral_files()) | {"config.json": as_json(CONFIG)}, "no weights"),
            ({"config.json": None}, "no config.json"),
            ({"config.json": b"<html>"}, "not JSON"),
            ({SHARDS[1]: None}, "names model-00002"),
            ({hub.INDEX: b"{"}, "cannot be read"),
            ({hub.INDEX: b"[]"}, "cannot be read"),
            ({hub.INDEX: b"[" * 100_000}, "cannot be read"),
            ({hub.INDEX: as_json({"weight_map": {}})}, "names no files"),
            ({hub.INDEX: an_index("../../.bashrc")}, "no shard"),
            ({hub.INDEX: an_index("/etc/passwd.safetensors")}, "no shard"),
            ({hub.INDEX: an_index("original/model.safetensors")}, "no shard"),
            ({hub.INDEX: an_index("..safetensors")}, "no shard"),
            ({hub.INDEX: an_index("a\nb.safetensors")}, "no shard"),
            ({hub.INDEX: an_index("consolidated.safetensors")}, "no shard"),
            ({hub.INDEX: an_index("pytorch_model.bin")}, "no shard"),
            ({hub.INDEX: an_index(7)}, "no shard"),
            ({hub.INDEX: an_index(None, "x")}, "names what is no shard"),
        ],
    )
    def test_refuses_what_is_no_checkpoint(
        self, fake: FakeHub, change: dict[str, bytes | None], message: str
    ) -> None:
        fake.lfs_limit = 10**9
        for name, data in change.items():
            if data is None:
                del fake.files[name]
            else:
                fake.files[name] = data
        with pytest.raises(CheckpointError, match=message) as caught:
            hub.plan(REPO)
        assert "\n" not in str(caught.value)
        assert not [path for path in fake.got() if path.endswith((".pt", ".bin", ".safetensors"))]

    def test_refuses_a_config_of_absurd_size_unread(self, fake: FakeHub) -> None:
        fake.listing = lambda answer: _resized(answer, "config.json", 10**10)
        with pytest.raises(CheckpointError, match="too large"):
            hub.plan(REPO)
        assert len(fake.requests) == 1

    @pytest.mark.parametrize(
        "edit",
        [
            lambda answer: b"<html>please log in</html>",
            lambda answer: [],
            lambda answer: {"sha": COMMIT},
            lambda answer: {**answer, "sha": "../../../etc"},
            lambda answer: {**answer, "sha": None},
            lambda answer: {**answer, "siblings": [{"rfilename": None}]},
            lambda answer: {**answer, "siblings": [7]},
            lambda answer: _resized(answer, "config.json", -1),
            lambda answer: _resized(answer, "config.json", None),
            lambda answer: _rehashed(answer, "../../../../tmp/evil"),
            lambda answer: _rehashed(answer, "0" * 63),
        ],
    )
    def test_does_not_believe_a_malformed_answer(self, fake: FakeHub, edit: Any) -> None:
        fake.listing = edit
        with pytest.raises(HubError, match="cannot be understood"):
            hub.plan(REPO)


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


class TestFetch:
    def test_brings_exactly_the_wanted_files(self, fake: FakeHub) -> None:
        meter = Meter()
        snapshot = fetch(meter)
        assert {path.name for path in snapshot.iterdir()} == WANTED
        assert all((snapshot / name).read_bytes() == fake.files[name] for name in WANTED)
        assert meter.done == meter.total == sum(len(fake.files[name]) for name in WANTED)
        assert meter.ended
        unwanted = [path for path in fake.got() if path.rsplit("/", 1)[-1] not in WANTED]
        assert unwanted == [f"/api/models/{REPO}"]

    def test_leaves_a_cache_that_the_hub_s_own_client_reads(self, fake: FakeHub) -> None:
        from huggingface_hub import hf_hub_download, scan_cache_dir

        snapshot = fetch()
        for name in WANTED:
            found = hf_hub_download(REPO, name, revision=COMMIT, local_files_only=True)
            assert Path(found) == snapshot / name
        report = scan_cache_dir(hub.cache_dir())
        assert not report.warnings
        assert report.size_on_disk == sum(len(fake.files[name]) for name in WANTED)

    def test_fetches_nothing_twice(self, fake: FakeHub) -> None:
        fetch()
        before, meter = len(fake.got("store")), Meter()
        remote = hub.plan(REPO)
        assert hub.missing_bytes(remote) == 0
        hub.fetch(remote, progress=meter)
        assert len(fake.got("store")) == before
        assert meter.done == meter.total

    def test_uses_a_blob_that_another_revision_brought(self, fake: FakeHub) -> None:
        fetch()
        fake.commit = "d" * 40
        before = len(fake.got("store"))
        snapshot = fetch()
        assert snapshot.name == "d" * 40
        assert len(fake.got("store")) == before
        assert (snapshot / SHARDS[0]).read_bytes() == fake.files[SHARDS[0]]

    @pytest.mark.parametrize("honest", [True, False])
    def test_leaves_huge_files_to_the_hub_s_own_client_and_hashes_them(
        self, fake: FakeHub, monkeypatch: pytest.MonkeyPatch, honest: bool
    ) -> None:
        monkeypatch.setattr(hub, "_MAX_PLAIN_HTTP", 80_000)
        if honest:
            assert (fetch() / SHARDS[0]).read_bytes() == fake.files[SHARDS[0]]
        else:
            fake.serve[SHARDS[0]] = bytes(len(fake.files[SHARDS[0]]))
            with pytest.raises(CheckpointError, match="SHA-256"):
                fetch()

    def test_keeps_the_token_from_the_store(
        self, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        fetch()
        assert {r.token for r in fake.requests if r.where == "hub"} == {"Bearer hf_secret"}
        assert {r.token for r in fake.requests if r.where == "store"} == {None}

    def test_says_nothing_by_itself(self, fake: FakeHub, capfd: pytest.CaptureFixture[str]) -> None:
        fake.fail(SHARDS[0], times=2, cut_after=10_000)
        fake.fail(hub.INDEX, times=1, cut_after=5)
        fetch()
        assert capfd.readouterr() == ("", "")


class TestHashes:
    def test_wrong_bytes_are_refused_and_leave_nothing(self, fake: FakeHub, cache: Path) -> None:
        good = fake.files[SHARDS[0]]
        fake.serve[SHARDS[0]] = good[:-1] + bytes([good[-1] ^ 1])
        with pytest.raises(CheckpointError, match="SHA-256"):
            fetch()
        assert not [path for path in cache.rglob("*") if "part" in path.name]
        assert not blob(cache, good).exists()
        fake.serve.clear()
        assert (fetch() / SHARDS[0]).read_bytes() == good

    def test_more_bytes_than_listed_are_refused(self, fake: FakeHub, cache: Path) -> None:
        fake.serve[SHARDS[0]] = fake.files[SHARDS[0]] + b"!"
        with pytest.raises(CheckpointError, match="SHA-256"):
            fetch()
        assert not blob(cache, fake.files[SHARDS[0]]).exists()

    def test_fewer_bytes_than_listed_are_refused(self, fake: FakeHub) -> None:
        fake.serve[SHARDS[0]] = fake.files[SHARDS[0]][:-1]
        with pytest.raises(MixchatError):
            fetch()

    @pytest.mark.parametrize("damage", [lambda data: data[:-1] + b"?", lambda data: data[:-1]])
    def test_a_damaged_file_in_the_cache_is_found_and_removed(
        self, fake: FakeHub, cache: Path, damage: Any
    ) -> None:
        snapshot = fetch()
        good = fake.files[SHARDS[1]]
        blob(cache, good).write_bytes(damage(good))
        with pytest.raises(CheckpointError, match=SHARDS[1]):
            fetch()
        assert not blob(cache, good).exists()
        assert not (snapshot / SHARDS[1]).is_symlink()
        assert (fetch() / SHARDS[1]).read_bytes() == good

    def test_a_small_file_cut_short_in_the_cache_is_removed(self, fake: FakeHub) -> None:
        snapshot = fetch()
        (snapshot / "config.json").resolve().write_bytes(b"{}")
        with pytest.raises(CheckpointError, match="size"):
            fetch()
        assert (fetch() / "config.json").read_bytes() == fake.files["config.json"]


class TestResuming:
    def test_a_dropped_connection_goes_on_where_it_stopped(self, fake: FakeHub) -> None:
        fake.fail(rf"^/{SHARDS[0]}", times=1, cut_after=40_000)
        meter = Meter()
        assert (fetch(meter) / SHARDS[0]).read_bytes() == fake.files[SHARDS[0]]
        asked = [r.range for r in fake.requests if r.where == "store" and SHARDS[0] in r.path]
        assert asked == [None, "bytes=40000-"]
        assert meter.done == meter.total

    def test_a_later_run_goes_on_where_ctrl_c_stopped(self, fake: FakeHub, cache: Path) -> None:
        fake.delay = 0.001  # so that the bytes come in more than one piece
        with pytest.raises(KeyboardInterrupt):
            fetch(Meter(stop_after=30_000))
        (left,) = [path.stat().st_size for path in cache.rglob("*.part")]
        assert 20_000 < left < 100_000
        meter = Meter()
        assert (fetch(meter) / SHARDS[0]).read_bytes() == fake.files[SHARDS[0]]
        assert f"bytes={left}-" in [request.range for request in fake.requests]
        assert meter.done == meter.total
        assert not list(cache.rglob("*.part"))

    @pytest.mark.parametrize("left", [b"", b"x" * 40_000, b"x" * 200_000])
    def test_what_is_left_over_is_not_believed(
        self, fake: FakeHub, cache: Path, left: bytes
    ) -> None:
        hub.plan(REPO)
        place = blob(cache, fake.files[SHARDS[0]])
        place.with_name(place.name + ".mixchat.part").write_bytes(left)
        try:
            snapshot = fetch()
        except CheckpointError:
            snapshot = fetch()
        assert (snapshot / SHARDS[0]).read_bytes() == fake.files[SHARDS[0]]

    def test_a_hub_without_ranges_starts_over(self, fake: FakeHub) -> None:
        fake.ranges = False
        fake.fail(rf"^/{SHARDS[0]}", times=1, cut_after=40_000)
        meter = Meter()
        assert (fetch(meter) / SHARDS[0]).read_bytes() == fake.files[SHARDS[0]]
        assert meter.done == meter.total

    def test_a_connection_that_always_breaks_off_is_given_up(self, fake: FakeHub) -> None:
        fake.fail(rf"^/{SHARDS[0]}", cut_after=0)
        with pytest.raises(HubError, match="broke off"):
            fetch()
        assert len(fake.got("store", "GET")) == 1 + len(resume._WAITS) + 1  # and tokenizer.model

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_a_busy_store_is_asked_again(self, fake: FakeHub, status: int) -> None:
        fake.fail(rf"^/{SHARDS[0]}", times=2, status=status)
        assert (fetch() / SHARDS[0]).read_bytes() == fake.files[SHARDS[0]]

    def test_two_programs_do_not_fetch_the_same_file(self, fake: FakeHub, cache: Path) -> None:
        from huggingface_hub.utils import WeakFileLock

        remote = hub.plan(REPO)
        sha256 = {file.path: file.sha256 for file in remote.files}[SHARDS[0]]
        lock = cache / ".locks" / "models--org--tiny-mixtral" / f"{sha256}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock), pytest.raises(HubError, match="another program"):
            hub.fetch(remote, progress=NoProgress())


class TestFaults:
    @pytest.mark.parametrize(
        ("status", "code", "error", "message", "hint"),
        [
            (401, "RepoNotFound", ModelNotFoundError, "no model org/tiny-mixtral", "HF_TOKEN"),
            (404, "RepoNotFound", ModelNotFoundError, "no model org/tiny-mixtral", "spelling"),
            (401, "GatedRepo", HubError, "accepted its conditions", "hf auth login"),
            (403, "GatedRepo", HubError, "accepted its conditions", "/org/tiny-mixtral, then"),
            (403, None, HubError, r"refuses access to .* \(403\)", "HF_TOKEN"),
            (404, None, ModelNotFoundError, "no model", None),
            (418, None, HubError, r"\(418\)", None),
            (429, None, HubError, "too many requests", "Wait"),
            (500, None, HubError, r"fault of its own \(500\)", "later"),
            (503, None, HubError, r"fault of its own \(503\)", "later"),
        ],
    )
    @pytest.mark.parametrize("where", ["api", "config", "shard"])
    def test_each_refusal_is_one_line(
        self,
        fake: FakeHub,
        where: str,
        status: int,
        code: str | None,
        error: type[MixchatError],
        message: str,
        hint: str | None,
    ) -> None:
        path = {"api": "^/api/", "config": "config.json", "shard": rf"resolve/.*{SHARDS[0]}"}[where]
        fake.fail(path, status=status, code=code, body=b'{"error": "two\\nlines \\u001b[31m"}')
        with pytest.raises(error, match=message) as caught:
            fetch()
        assert type(caught.value) is error
        assert str(caught.value).isprintable()
        assert hint is None or hint in (caught.value.hint or "")
        assert (caught.value.hint or "").isprintable()

    def test_a_token_that_is_not_accepted(
        self, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        fake.fail(rf"resolve/.*{SHARDS[0]}", status=401)
        with pytest.raises((HubError, ModelNotFoundError)) as caught:
            fetch()
        assert "hf_wrong" not in str(caught.value)

    def test_a_listed_file_that_is_gone(self, fake: FakeHub) -> None:
        fake.gone.add(SHARDS[1])
        with pytest.raises(HubError, match="lists a file"):
            fetch()

    @pytest.mark.parametrize("header", ["X-Repo-Commit", "ETag"])
    def test_what_is_no_hub(self, fake: FakeHub, header: str) -> None:
        fake.omit_headers.add(header)
        with pytest.raises(HubError, match="does not answer like a hub"):
            fetch()

    def test_nobody_there(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with FakeHub({}) as gone:
            monkeypatch.setenv("HF_ENDPOINT", gone.url)
        with pytest.raises(HubError, match=r"cannot reach the hub at 127\.0\.0\.1:\d+$"):
            hub.plan(REPO)

    def test_the_store_is_not_there(self, fake: FakeHub) -> None:
        remote = hub.plan(REPO)
        fake._servers[1].shutdown()
        fake._servers[1].server_close()
        with pytest.raises(HubError, match="cannot reach"):
            hub.fetch(remote, progress=NoProgress())

    def test_switched_off(self, fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            hub.plan(REPO)
        assert not fake.requests

    @pytest.mark.parametrize(
        "address", ["hub", "ftp://hub", "http://", "http://[", "http://hub:port", "http://h\x1b"]
    )
    def test_an_address_that_is_none(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, address: str
    ) -> None:
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UsageError, match="HF_ENDPOINT") as caught:
            hub.plan(REPO)
        assert str(caught.value).isprintable()

    def test_a_full_disk(self, fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(resume, "open", full, raising=False)
        with pytest.raises(ResourceError, match="disk is full"):
            fetch()

    def test_a_cache_that_cannot_be_written(self, fake: FakeHub, cache: Path) -> None:
        cache.write_text("a file where the directory should be")
        with pytest.raises(UsageError, match="cannot be written"):
            fetch()


@pytest.mark.slow
def test_ctrl_c_stops_a_slow_download_at_once(fake: FakeHub, tmp_path: Path) -> None:
    fake.delay = 0.2
    program = (
        "from mixchat.weights import hub; from mixchat.progress import NoProgress\n"
        f"hub.fetch(hub.plan({REPO!r}), progress=NoProgress())"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": fake.url,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "*",
    }
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while not any(SHARDS[0] in path for path in fake.got("store")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            fake.closing.wait(0.05)
        fake.closing.wait(0.5)
        process.send_signal(signal.SIGINT)
        before = time.monotonic()
        _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - before < 3
    assert stderr.rstrip().endswith("KeyboardInterrupt")
