"""Each failure of a hub is an error of one line, whichever request it meets."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
from fake_hub import REPO, FakeHub
from patience import PATIENCE_S
from tiny_tokenizer import write_tokenizer
from weight_tools import Bar, files_of, shard_names

from mixchat.base.errors import HubError, ModelNotFoundError, ResourceError, UsageError
from mixchat.install.source import hub, hub_request, transfer
from mixchat.install.source.hub_checkpoint import HubCheckpoint
from mixchat.weights.format.manifest import Source
from mixchat.weights.format.workspace import workspace

SHARDS = shard_names(2)


def plan(place: Path) -> HubCheckpoint:
    remote = hub.look_up(REPO)
    return HubCheckpoint(remote, Source(REPO, remote.commit), place / "target")


def fetch(place: Path) -> None:
    """Everything that a download asks a hub for."""
    checkpoint = plan(place)
    checkpoint.companions()
    checkpoint.rate(checkpoint.index.shards, keep=False)
    for shard in SHARDS:
        checkpoint.fetch(shard, Bar(), Event())


class TestFaults:
    @pytest.mark.parametrize(
        ("status", "code", "error", "message", "hint"),
        [
            (401, "RepoNotFound", ModelNotFoundError, "no model org/tiny-mixtral", "HF_TOKEN"),
            (404, "RepoNotFound", ModelNotFoundError, "no model org/tiny-mixtral", "spelling"),
            (403, "GatedRepo", HubError, "accepted its conditions", "/org/tiny-mixtral, then"),
            (403, None, HubError, r"refuses access to .* \(403\)", "HF_TOKEN"),
            (418, None, HubError, r"\(418\)", None),
            (429, None, HubError, "too many requests", "Wait"),
            (500, None, HubError, r"an error of its own \(500\)", "later"),
        ],
    )
    @pytest.mark.parametrize("where", ["api", "config", "shard"])
    def test_each_refusal_is_one_line(
        self, fake, tmp_path, where, status, code, error, message, hint
    ):
        path = {"api": "^/api/", "config": "config.json", "shard": SHARDS[0]}[where]
        fake.fail(path, status=status, code=code, body=b'{"error": "two\\nlines \\u001b[31m"}')
        with pytest.raises(error, match=message) as caught:
            fetch(tmp_path)
        assert type(caught.value) is error
        assert str(caught.value).isprintable()
        assert hint is None or hint in (caught.value.hint or "")
        assert (caught.value.hint or "").isprintable()

    def test_a_token_that_is_not_accepted(self, fake, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        fake.fail(rf"resolve/.*{SHARDS[0]}", status=401)
        with pytest.raises((HubError, ModelNotFoundError)) as caught:
            fetch(tmp_path)
        assert "hf_wrong" not in str(caught.value)

    def test_a_listed_file_that_is_gone(self, fake, tmp_path):
        fake.gone.add(SHARDS[1])
        with pytest.raises(HubError, match="lists a file"):
            fetch(tmp_path)

    def test_an_answer_without_an_end_is_not_read_to_it(self, fake, monkeypatch):
        """huggingface_hub reads a listing, and the reason of a refusal, whole into memory."""
        monkeypatch.setattr(hub_request, "_JSON_BYTES_MAX", 10_000)
        fake.listing = lambda answer: b" " * 10_000 + json.dumps(answer).encode()
        with pytest.raises(HubError, match="is not valid"):
            hub.look_up(REPO)
        fake.fail("^/api/", status=500, body=bytes(50_000_000))
        with pytest.raises(HubError, match="an error of its own"):
            hub.look_up(REPO)

    def test_nobody_there(self, cache, monkeypatch):
        with FakeHub({}) as gone:
            monkeypatch.setenv("HF_ENDPOINT", gone.url)
        with pytest.raises(HubError, match=r"cannot reach the hub at 127\.0\.0\.1:\d+$"):
            hub.look_up(REPO)

    def test_the_store_is_not_there(self, fake, tmp_path):
        checkpoint = plan(tmp_path)
        fake._servers[1].shutdown()
        fake._servers[1].server_close()
        with pytest.raises(HubError, match="cannot reach"):
            checkpoint.fetch(SHARDS[0], Bar(), Event())

    @pytest.mark.parametrize(
        "address", ["hub", "ftp://hub", "http://", "http://[", "http://hub:port", "http://h\x1b"]
    )
    def test_an_address_that_is_none(self, cache, monkeypatch, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(UsageError, match="HF_ENDPOINT") as caught:
            hub.look_up(REPO)
        assert str(caught.value).isprintable()

    def test_a_full_disk(self, fake, tmp_path, monkeypatch):
        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(transfer, "open", full, raising=False)
        with pytest.raises(ResourceError, match="disk is full"):
            fetch(tmp_path)

    def test_a_cache_that_cannot_be_written(self, fake, tmp_path, cache):
        cache.write_text("a file where the directory should be")
        fetch(tmp_path)
        remote = hub.look_up(REPO)
        checkpoint = HubCheckpoint(remote, Source(REPO), tmp_path / "other", keep_source=True)
        with pytest.raises(UsageError, match="cannot write"):
            checkpoint.companions()


def _new(directory: Path) -> Path:
    directory.mkdir()
    return directory


def interrupted(fake: FakeHub, home: Path, ready: Callable[[], bool]) -> str:
    """Ctrl-C for a download once `ready`, which has to end it within a minute: what it said."""
    program = (
        "from mixchat.__main__ import main; import sys\n"
        f"sys.argv[1:] = ['download', {REPO!r}]; main()"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": fake.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "MIXCHAT_HOME": str(home / "home"),
        "NO_PROXY": "*",
    }
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            fake.closing.wait(0.05)
        fake.closing.wait(0.5)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    return stderr


@pytest.mark.slow
def test_ctrl_c_ends_a_download_at_once_while_headers_trickle(fake, tmp_path):
    """Threads of a pool are waited for at its end: it took as long as the slowest header."""
    fake.delay, fake.step, fake.slow = 0.3, 10, SHARDS[0]  # minutes for its header
    interrupted(fake, tmp_path, lambda: any(SHARDS[0] in path for path in fake.got("store")))


@pytest.mark.slow
def test_ctrl_c_ends_a_download_at_once_while_a_shard_trickles(fake, tmp_path):
    fake.files |= files_of(write_tokenizer(_new(tmp_path / "tokenizer")))
    fake.delay, fake.step = 0.5, 70_000  # headers come in one piece
    place = workspace(tmp_path / "home" / "models" / REPO.replace("/", "--"))
    said = interrupted(fake, tmp_path, (place / "journal.jsonl").exists)
    assert "the same command resumes" in said
    assert (place / "journal.jsonl").exists()
    assert list((place / "source").iterdir())
