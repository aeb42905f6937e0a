"""From a name to an installed model: the checks before it, and what a failure leaves."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, REPO
from safetensors.torch import load_file, save_file
from weight_tools import NF4, Meter, files_of, get, left_in, shard_names, snapshot_dir

from mixchat.base import machine
from mixchat.base.errors import CheckpointError, HubError, ResourceError, UsageError
from mixchat.install import models
from mixchat.install.make.download import DownloadRequest, download, plan_download
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.parts import ModelPart
from mixchat.install.models import resolve
from mixchat.install.source import demo
from mixchat.weights.format.journal import JOURNAL_FILE
from mixchat.weights.format.manifest import is_installed, read_manifest
from mixchat.weights.format.workspace import workspace

pytestmark = pytest.mark.usefixtures("home")
SHARDS = shard_names(2)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("nothing should be made")


class TestHub:
    def test_makes_an_installed_model_and_leaves_nothing_else(self, fake, home, cache, made):
        fake.files["pytorch_model.bin"] = b"pickle" * 1000
        path = get(REPO)
        assert path == home / "models" / "org--tiny-mixtral" == models.installed_directory(REPO)
        source = read_manifest(path).source
        assert (source.repo, source.commit) == (REPO, COMMIT)
        assert not [request for request in fake.got() if "pytorch_model" in request]
        assert files_of(path) == files_of(made)
        assert (os.listdir(home), os.listdir(home / "models")) == (["models"], [path.name])
        assert sum(map(len, files_of(cache / "models--org--tiny-mixtral").values())) < 100_000

    def test_asks_nobody_where_the_model_is_installed_already(self, fake, monkeypatch):
        path = get(REPO)
        fake.requests.clear()
        monkeypatch.setattr(CheckpointBuild, "run", refuse)
        assert get(REPO) == path == get("org--tiny-mixtral") == get(REPO, revision=COMMIT[:7])
        assert plan_download(DownloadRequest(resolve(REPO), NF4), Meter()) is None
        assert not fake.requests

    def test_without_the_hub_a_snapshot_in_the_cache_will_do(self, fake, made, monkeypatch):
        from huggingface_hub import constants

        get(REPO, key="one", keep_source=True)  # which notes what `main` stands for, too
        fake.requests.clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        for key, how in (("two", {}), ("three", {"revision": COMMIT})):
            path = get(REPO, key=key, **how)
            assert read_manifest(path).source.commit == COMMIT
        assert files_of(get(REPO, key="two")) == files_of(made)
        assert not fake.requests
        assert (snapshot_dir(REPO, COMMIT) / SHARDS[0]).exists()

    def test_without_the_hub_and_without_a_snapshot_it_says_so(self, fake, monkeypatch):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            get(REPO)
        snapshot_dir(REPO, COMMIT).mkdir(parents=True)
        (snapshot_dir(REPO, COMMIT) / "config.json").write_text("{}")
        with pytest.raises(HubError, match="not complete"):
            get(REPO, revision=COMMIT)


class TestRoom:
    @pytest.mark.parametrize(
        ("free", "message"),
        [("free_disk", "needed, 1 kB free"), ("free_memory", "memory: .* needed, 1 kB free")],
    )
    def test_disk_and_memory_are_checked_before_any_weights(
        self, fake, home, monkeypatch, free, message
    ):
        monkeypatch.setattr(machine, free, lambda *_: 1000)
        announced: list[Any] = []
        with pytest.raises(ResourceError, match=message):
            download(DownloadRequest(resolve(REPO), NF4), Meter(), announce=announced.append)
        assert len(announced) == 1
        assert left_in(home) == ["models"]

    def test_the_demo_needs_room_to_be_built_in(self, home, monkeypatch):
        monkeypatch.setattr(demo, "build_checkpoint", refuse)
        monkeypatch.setattr(machine, "free_disk", lambda place: 1_500_000_000)
        with pytest.raises(ResourceError, match=r"needed, 1\.5 GB free"):
            get("demo")

    def test_a_disk_that_fills_up_meanwhile_leaves_what_is_done(
        self, two_shards, home, monkeypatch, save_each_part
    ):
        def full(part: ModelPart, *_: object) -> None:
            raise OSError(28, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ModelPart, "make", full)
            with pytest.raises(ResourceError, match="disk is full") as caught:
                get(str(two_shards), key="tiny")
        assert "resumes" in (caught.value.hint or "")
        assert (workspace(home / "models" / "tiny") / JOURNAL_FILE).exists()
        assert is_installed(get(str(two_shards), key="tiny"))

    def test_a_data_directory_that_cannot_be_written(self, tiny_checkpoint, home):
        home.write_text("a file")
        with pytest.raises(UsageError, match="cannot write") as caught:
            get(str(tiny_checkpoint), key="tiny")
        assert "MIXCHAT_HOME" in (caught.value.hint or "")


class TestCheck:
    def test_it_sees_the_small_files_before_any_weight_is_fetched(self, fake, home):
        def check(checkpoint: Path) -> None:
            assert json.loads((checkpoint / "config.json").read_bytes())
            raise CheckpointError("no tokenizer")

        with pytest.raises(CheckpointError, match="no tokenizer"):
            get(REPO, check=check)
        assert left_in(home) == ["models"]

    def test_a_fault_of_the_weights_leaves_what_was_made_before_it(
        self, two_shards, tmp_path, home
    ):
        checkpoint = Path(shutil.copytree(two_shards, tmp_path / "tiny"))
        path = checkpoint / SHARDS[1]
        tensors = load_file(path)
        save_file(
            {name: tensor.fill_(float("nan")) for name, tensor in tensors.items()},
            path,
        )
        with pytest.raises(CheckpointError, match="holds NaN"):
            get(str(checkpoint))
        assert not is_installed(home / "models" / "tiny")
        assert (workspace(home / "models" / "tiny") / JOURNAL_FILE).exists()
