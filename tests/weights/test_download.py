"""From a name to a kept model: what is checked first, and what is left when something fails."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import namedtuple
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
from mixchat.weights import demo, models, quantize
from mixchat.weights.download import download
from mixchat.weights.manifest import read_manifest
from mixchat.weights.models import resolve
from mixchat.weights.quantize import QuantizeOptions

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def fake(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeHub]:
    """A hub with the tiny Mixtral, and a pickle beside it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "*")
    files = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
    with FakeHub({**files, "pytorch_model.bin": b"pickle" * 1000}) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        yield fake


def get(name: str, *, key: str | None = None, revision: str | None = None) -> Path:
    ref = resolve(name, key=key)
    return download(ref, QuantizeOptions(), progress=NoProgress(), revision=revision)


def left_in(home: Path) -> list[str]:
    """What lies in the data directory, but for the lock files."""
    return sorted(
        str(path.relative_to(home)) for path in home.rglob("*") if not path.name.endswith(".lock")
    )


def refuse_to_quantize(*_: object, **__: object) -> None:
    raise AssertionError("nothing should be quantized")


class TestHub:
    def test_makes_a_kept_model(self, fake: FakeHub, home: Path) -> None:
        path = get(REPO)
        assert path == home / "models" / "org--tiny-mixtral" == models.find(REPO)
        source = read_manifest(path).source
        assert (source.repo, source.commit) == (REPO, COMMIT)
        assert not [request for request in fake.got() if "pytorch_model" in request]

    def test_asks_nobody_where_the_model_is_kept_already(
        self, fake: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = get(REPO)
        fake.requests.clear()
        monkeypatch.setattr(quantize, "quantize_checkpoint", refuse_to_quantize)
        assert get(REPO) == path == get("org--tiny-mixtral") == get(REPO, revision=COMMIT[:7])
        assert not fake.requests

    def test_does_not_pass_off_one_revision_as_another(self, fake: FakeHub) -> None:
        get(REPO)
        with pytest.raises(UsageError, match="already kept, from revision c0ffee"):
            get(REPO, revision="dddd")

    def test_a_failed_download_leaves_no_model(self, fake: FakeHub, home: Path) -> None:
        fake.fail("model.safetensors", status=403)
        with pytest.raises(HubError):
            get(REPO)
        assert left_in(home) == ["models"]

    def test_an_unfinished_model_is_made_anew(self, fake: FakeHub, home: Path) -> None:
        stale = home / "models" / "org--tiny-mixtral" / "experts-099.safetensors"
        stale.parent.mkdir(parents=True)
        stale.write_bytes(b"half")
        assert models.is_finished(get(REPO))
        assert not stale.exists()


class TestDisk:
    @pytest.fixture
    def free(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
        free = {"bytes": 1000}
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, free["bytes"]))
        return free

    def test_is_checked_before_any_weights(
        self, fake: FakeHub, free: dict[str, int], home: Path
    ) -> None:
        with pytest.raises(ResourceError, match=r"needed, 1 kB free") as caught:
            get(REPO)
        assert "MIXCHAT_HOME" in caught.value.hint
        assert not fake.got("store")
        assert left_in(home) == ["models"]

    def test_what_is_in_the_cache_is_not_counted_again(
        self, fake: FakeHub, free: dict[str, int], tiny_checkpoint: Path
    ) -> None:
        from mixchat.weights import hub

        remote = hub.plan(REPO)
        kept = quantize.kept_size(remote.config, QuantizeOptions())
        free["bytes"] = kept + hub.missing_bytes(remote) - 1
        with pytest.raises(ResourceError):
            get(REPO)
        hub.fetch(remote, progress=NoProgress())
        free["bytes"] = kept
        assert get(REPO)

    def test_the_demo_needs_room_to_be_built_in(
        self, free: dict[str, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(demo, "build_checkpoint", refuse_to_quantize)
        free["bytes"] = 1_500_000_000
        with pytest.raises(ResourceError, match=r"needed, 1\.5 GB free"):
            get("demo")

    def test_a_disk_that_fills_up_meanwhile(
        self, tiny_checkpoint: Path, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(checkpoint: Path, target: Path, *_: object, **__: object) -> None:
            target.mkdir()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(quantize, "quantize_checkpoint", full)
        with pytest.raises(ResourceError, match="disk is full"):
            get(str(tiny_checkpoint), key="tiny")
        assert left_in(home) == ["models"]

    def test_a_data_directory_that_cannot_be_written(
        self, tiny_checkpoint: Path, home: Path
    ) -> None:
        home.write_text("a file")
        with pytest.raises(UsageError, match="cannot write") as caught:
            get(str(tiny_checkpoint), key="tiny")
        assert "MIXCHAT_HOME" in caught.value.hint


class TestLocal:
    def test_makes_a_kept_model_and_leaves_the_source_alone(self, tiny_checkpoint: Path) -> None:
        before = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}
        path = get(str(tiny_checkpoint), key="tiny")
        assert read_manifest(path).source.repo == str(tiny_checkpoint)
        assert {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()} == before
        assert get(str(tiny_checkpoint), key="tiny") == path == get("tiny")

    def test_another_directory_of_the_same_name_is_not_taken_for_it(
        self, tiny_checkpoint: Path, tmp_path: Path
    ) -> None:
        get(str(tiny_checkpoint), key="tiny")
        shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
        with pytest.raises(UsageError, match="already kept; it came from") as caught:
            get(str(tmp_path / "tiny"))
        assert "--name" in caught.value.hint

    def test_a_kept_model_needs_nothing(self, tiny_model: Path, home: Path) -> None:
        assert get(str(tiny_model)) == tiny_model
        assert not home.exists()

    def test_only_pickles(self, tiny_checkpoint: Path, tmp_path: Path, home: Path) -> None:
        source = tmp_path / "pickled"
        source.mkdir()
        shutil.copy(tiny_checkpoint / "config.json", source)
        (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
        with pytest.raises(CheckpointError, match="only pickled weights") as caught:
            get(str(source))
        assert "pickle" in caught.value.hint
        assert left_in(home) == ["models"]

    def test_no_checkpoint_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match=r"config\.json: the file is missing"):
            get(str(tmp_path / "empty"))

    def test_an_unfinished_key_has_to_name_its_directory(self, home: Path) -> None:
        (home / "models" / "half").mkdir(parents=True)
        with pytest.raises(ModelNotFoundError, match="unfinished"):
            get("half")

    @pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError, RuntimeError, OSError])
    def test_whatever_goes_wrong_leaves_no_model(
        self,
        tiny_checkpoint: Path,
        home: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: type[BaseException],
    ) -> None:
        def half(checkpoint: Path, target: Path, *_: object, **__: object) -> None:
            target.mkdir()
            (target / "shared.safetensors").write_bytes(b"half")
            raise error("stopped")

        monkeypatch.setattr(quantize, "quantize_checkpoint", half)
        with pytest.raises(error):
            get(str(tiny_checkpoint), key="tiny")
        assert left_in(home) == ["models"]


class TestDemo:
    @pytest.fixture
    def tiny_demo(self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """Builds the tiny Mixtral instead; the list tells where."""
        built: list[Path] = []

        def build(target: Path, progress: object) -> None:
            built.append(target)
            shutil.copytree(tiny_checkpoint, target)

        config = json.loads((tiny_checkpoint / "config.json").read_bytes())
        monkeypatch.setattr(demo, "CONFIG", config)
        monkeypatch.setattr(demo, "BUILD_BYTES", 0)
        monkeypatch.setattr(demo, "build_checkpoint", build)
        return built

    def test_is_built_once_and_its_checkpoint_removed(
        self, tiny_demo: list[Path], home: Path
    ) -> None:
        path = get("demo")
        assert get("demo") == path == models.find("demo")
        assert read_manifest(path).source.repo == "demo"
        assert len(tiny_demo) == 1
        assert home in tiny_demo[0].parents
        assert os.listdir(home) == ["models"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, HubError])
    def test_a_failed_build_leaves_nothing(
        self,
        tiny_demo: list[Path],
        home: Path,
        monkeypatch: pytest.MonkeyPatch,
        error: type[BaseException],
    ) -> None:
        def build(target: Path, progress: object) -> None:
            target.mkdir()
            (target / "half").write_bytes(b"half")
            raise error("stopped")

        monkeypatch.setattr(demo, "build_checkpoint", build)
        with pytest.raises(error):
            get("demo")
        assert left_in(home) == ["models"]

    def test_what_a_killed_build_left_is_swept_away(
        self, tiny_demo: list[Path], home: Path
    ) -> None:
        old, new = home / ".demo-old", home / ".demo-new"
        for directory in (old, new):
            (directory / "checkpoint").mkdir(parents=True)
        os.utime(old, (1, 1))
        get("demo")
        assert not old.exists()
        assert new.exists()


def test_two_programs_do_not_make_the_same_model(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def again(checkpoint: Path, target: Path, *_: object, **__: object) -> None:
        with pytest.raises(UsageError, match="another mixchat") as caught:
            get(str(tiny_checkpoint), key="tiny")
        seen.append(caught.value)
        raise MixchatError("enough")

    monkeypatch.setattr(quantize, "quantize_checkpoint", again)
    with pytest.raises(MixchatError, match="enough"):
        get(str(tiny_checkpoint), key="tiny")
    assert len(seen) == 1


class TestAlreadyKept:
    def test_with_other_quantization_it_is_not_passed_off_as_what_was_asked_for(
        self, tiny_checkpoint: Path
    ) -> None:
        ref = resolve(str(tiny_checkpoint), key="mine")
        kept = download(ref, QuantizeOptions(), progress=NoProgress())
        assert download(ref, QuantizeOptions(), progress=NoProgress()) == kept
        for other in (QuantizeOptions(attention=True), QuantizeOptions(quant_type="none")):
            with pytest.raises(UsageError, match="quantized otherwise"):
                download(ref, other, progress=NoProgress())

    def test_damaged_it_is_not_called_ready(self, tiny_checkpoint: Path) -> None:
        kept = get(str(tiny_checkpoint), key="mine")
        (kept / "experts-001.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"experts-001\.safetensors: the file is missing"):
            get(str(tiny_checkpoint), key="mine")

    def test_the_same_revision_may_be_asked_for_again(self, fake: FakeHub) -> None:
        kept = get(REPO, revision="main")
        assert read_manifest(kept).source.revision == "main"
        assert get(REPO, revision="main") == kept
        assert get(REPO, revision=COMMIT[:8]) == kept
        assert get(REPO) == kept
        with pytest.raises(UsageError, match="already kept, from revision"):
            get(REPO, revision="other")

    @pytest.mark.parametrize("name", ["demo", "."])
    def test_a_revision_goes_with_the_hub_alone(self, name: str, home: Path) -> None:
        with pytest.raises(UsageError, match="--revision"):
            get(name, key="mine", revision="main")
        assert not home.exists()

    def test_what_is_in_the_way_is_not_removed(self, tiny_checkpoint: Path, home: Path) -> None:
        elsewhere = home / "elsewhere"
        elsewhere.mkdir(parents=True)
        (home / "models").mkdir()
        (home / "models" / "link").symlink_to(elsewhere)
        (home / "models" / "file").write_text("mine")
        for key in ("link", "file"):
            with pytest.raises(UsageError, match="in the way"):
                get(str(tiny_checkpoint), key=key)
        assert elsewhere.is_dir()
        assert (home / "models" / "file").read_text() == "mine"


class TestCheck:
    def test_it_sees_the_small_files_before_any_weight_is_fetched(self, fake: FakeHub) -> None:
        def refuse(checkpoint: Path) -> None:
            assert (checkpoint / "config.json").exists()
            raise CheckpointError("no tokenizer")

        with pytest.raises(CheckpointError, match="no tokenizer"):
            download(resolve(REPO), QuantizeOptions(), progress=NoProgress(), check=refuse)
        assert not any("safetensors" in request.path for request in fake.requests)
