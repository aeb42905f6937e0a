"""Downloads of directories and of the demo, and names under which a model is installed already."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from fake_hub import COMMIT, REPO
from patience import PATIENCE_S
from safetensors.torch import load_file
from weight_tools import NF4, Meter, files_of, get, left_in

from mixchat.base.errors import CheckpointError, HubError, UsageError
from mixchat.base.lock import exclusive_lock
from mixchat.base.progress import NoProgress
from mixchat.base.safetensors import SafetensorsWriter
from mixchat.install import models
from mixchat.install.make import download
from mixchat.install.make.build import Build
from mixchat.install.make.download import DownloadRequest
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.quantize_options import QuantizeOptions
from mixchat.install.models import resolve
from mixchat.install.source import demo
from mixchat.install.source.checkpoint_index import SINGLE
from mixchat.weights.format.manifest import is_installed, read_manifest
from mixchat.weights.format.workspace import MODEL_DIR, OLD_DIR, SOURCE_DIR, workspace

pytestmark = pytest.mark.usefixtures("home")


class TestLocal:
    def test_makes_an_installed_model_and_leaves_the_source_alone(self, tiny_checkpoint):
        before = files_of(tiny_checkpoint)
        path = get(str(tiny_checkpoint), key="tiny")
        assert read_manifest(path).source.repo == str(tiny_checkpoint)
        assert files_of(tiny_checkpoint) == before
        assert get(str(tiny_checkpoint), key="tiny") == path == get("tiny")

    def test_another_directory_of_the_same_name_is_not_taken_for_it(
        self, tiny_checkpoint, tmp_path
    ):
        get(str(tiny_checkpoint), key="tiny")
        shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
        with pytest.raises(UsageError, match="already installed; it came from") as caught:
            get(str(tmp_path / "tiny"))
        assert "--name" in (caught.value.hint or "")

    def test_an_installed_model_needs_nothing(self, tiny_model, home):
        assert get(str(tiny_model)) == tiny_model
        assert not home.exists()

    def test_an_installed_model_cannot_have_another_name(self, tiny_model):
        """It was said to be ready under the name, under which nothing was found afterwards."""
        with pytest.raises(UsageError, match="is an installed model"):
            get(str(tiny_model), key="other")

    def test_only_pickles(self, tiny_checkpoint, tmp_path, home):
        source = tmp_path / "pickled"
        source.mkdir()
        shutil.copy(tiny_checkpoint / "config.json", source)
        (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
        with pytest.raises(CheckpointError, match="only pickled weights") as caught:
            get(str(source))
        assert "pickle" in (caught.value.hint or "")
        assert left_in(home) == ["models"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError, HubError])
    def test_whatever_goes_wrong_leaves_no_model_but_work_to_resume(
        self, tiny_checkpoint, home, monkeypatch, error
    ):
        def half(build: CheckpointBuild, *_: object, **__: object) -> None:
            build.directory.mkdir(parents=True)
            (build.directory / "shared.safetensors").write_bytes(b"half")
            raise error("stopped")

        monkeypatch.setattr(CheckpointBuild, "run", half)
        with pytest.raises(error):
            get(str(tiny_checkpoint), key="tiny")
        place = "models/.tiny.mixchat.unfinished"
        model = [f"{place}/model", f"{place}/model/shared.safetensors"]
        assert left_in(home) == ["models", place, *model]
        assert not is_installed(home / "models" / "tiny")


class TestDemo:
    @pytest.fixture
    def tiny_demo(self, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """Builds the tiny Mixtral instead; the list tells where."""
        built: list[Path] = []
        tensors = load_file(tiny_checkpoint / SINGLE)

        def build(target: Path, progress: object) -> None:
            built.append(target)
            shutil.copytree(tiny_checkpoint, target)
            specs = demo.DemoCheckpoint(target, NoProgress()).index.header(SINGLE).specs
            with SafetensorsWriter(target / SINGLE, specs) as writer:
                for spec in specs:
                    writer.write(spec.name, tensors[spec.name].to(spec.dtype))

        config = json.loads((tiny_checkpoint / "config.json").read_bytes())
        monkeypatch.setattr(demo, "DEMO_CONFIG", config)
        monkeypatch.setattr(demo, "BUILD_BYTES", 0)
        monkeypatch.setattr(demo, "build_checkpoint", build)
        return built

    def test_is_built_once_and_its_checkpoint_removed(self, tiny_demo, home):
        path = get("demo")
        assert get("demo") == path == models.installed_directory("demo")
        assert read_manifest(path).source.repo == "demo"
        assert tiny_demo == [workspace(path) / SOURCE_DIR / "checkpoint"]
        assert os.listdir(home) == ["models"]
        assert os.listdir(home / "models") == ["demo"]

    @pytest.mark.parametrize("error", [KeyboardInterrupt, HubError])
    def test_a_failed_build_leaves_no_checkpoint(self, tiny_demo, home, monkeypatch, error):
        def build(target: Path, progress: object) -> None:
            target.mkdir(parents=True)
            (target / "half").write_bytes(b"half")
            raise error("stopped")

        monkeypatch.setattr(demo, "build_checkpoint", build)
        with pytest.raises(error):
            get("demo")
        assert left_in(home) in (["models"], ["models", "models/.demo.mixchat.unfinished"])

    def test_what_a_killed_build_left_is_built_again(self, tiny_demo, home):
        source = workspace(home / "models" / "demo") / SOURCE_DIR
        stale = source / "checkpoint"
        stale.mkdir(parents=True)
        (stale / "half").write_bytes(b"half")
        (source / ".demo-wheel-x").mkdir()
        path = get("demo")
        assert is_installed(path)
        assert not source.parent.exists()

    def test_resumes_where_it_was_cut_off(self, tiny_demo, home, monkeypatch):
        def cut(*_: object) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Build, "_finish", cut)
            with pytest.raises(KeyboardInterrupt):
                get("demo")
        meter = Meter()
        get("demo", meter=meter)
        bar = meter.bar("quantizing")
        assert bar.first == bar.total


class TestTwoProcesses:
    def test_the_second_waits_for_the_first_and_takes_its_model(
        self, tiny_checkpoint, home, monkeypatch
    ):
        target, said = home / "models" / "tiny", threading.Event()
        meter = Meter()
        note = meter.note

        def noted(text: str) -> None:
            note(text)
            said.set()

        meter.note = noted  # type: ignore[method-assign]
        got: list[Path] = []

        def second() -> None:
            got.append(get(str(tiny_checkpoint), key="tiny", meter=meter))

        waiting = threading.Thread(target=second, daemon=True)
        with exclusive_lock(target):
            waiting.start()
            assert said.wait(PATIENCE_S)
            request = DownloadRequest(resolve(str(tiny_checkpoint), key="tiny"), NF4)
            download._install(request, Meter(), lambda plan: None)
        waiting.join(PATIENCE_S)
        assert got == [target]
        assert meter.notes == ["another mixchat is installing tiny; waiting for it"]
        assert meter.bars == []


class TestAlreadyInstalled:
    @pytest.mark.parametrize(
        "other",
        [
            QuantizeOptions(attention=4),
            QuantizeOptions(attention=16),
            QuantizeOptions(head=4),
            QuantizeOptions(head=16),
            QuantizeOptions(quant_type="none"),
            QuantizeOptions(quant_type="trellis3"),
        ],
    )
    def test_with_other_quantization_it_is_not_taken_for_what_was_requested(
        self, tiny_checkpoint, other
    ):
        installed = get(str(tiny_checkpoint), key="mine")
        assert get(str(tiny_checkpoint), key="mine") == installed
        with pytest.raises(UsageError, match="quantized differently") as caught:
            get(str(tiny_checkpoint), key="mine", options=other)
        assert "mixchat rm mine" in (caught.value.hint or "")

    def test_with_other_scales_it_is_the_same_model(self, tiny_checkpoint):
        options = QuantizeOptions(scales="absmax")
        installed = get(str(tiny_checkpoint), key="mine", options=options)
        assert get(str(tiny_checkpoint), key="mine") == installed
        assert read_manifest(installed).quantization["scales"] == "absmax"

    def test_damaged_it_is_not_called_ready(self, tiny_checkpoint):
        installed = get(str(tiny_checkpoint), key="mine")
        (installed / "experts-001.safetensors").unlink()
        with pytest.raises(
            CheckpointError, match=r"experts-001\.safetensors: the file is missing"
        ) as caught:
            get(str(tiny_checkpoint), key="mine")
        assert "mixchat repair" in (caught.value.hint or "")

    def test_the_same_revision_may_be_requested_again(self, fake):
        installed = get(REPO, revision="main")
        assert read_manifest(installed).source.revision == "main"
        assert get(REPO, revision="main") == installed
        assert get(REPO, revision=COMMIT[:8]) == installed
        assert get(REPO) == installed
        for other in ("other", COMMIT[:6]):  # which may be a branch's name
            with pytest.raises(UsageError, match=r"already installed, from revision .*c0ffee"):
                get(REPO, revision=other)

    @pytest.mark.parametrize("name", ["", SOURCE_DIR, MODEL_DIR, OLD_DIR])
    def test_a_link_does_not_choose_where_files_are_fetched_to(self, fake, home, name):
        """The small files of a checkpoint stayed in the directory of a planted link."""
        elsewhere, planted = home / "elsewhere", workspace(resolve(REPO).directory) / name
        elsewhere.mkdir(parents=True)
        (elsewhere / "precious").write_text("precious")
        planted.parent.mkdir(parents=True)
        planted.symlink_to(elsewhere)
        installed = get(REPO, check=lambda directory: None)
        assert is_installed(installed)
        assert [*elsewhere.iterdir()] == [elsewhere / "precious"]

    @pytest.mark.parametrize("name", ["demo", "."])
    def test_a_revision_goes_with_the_hub_alone(self, name, home):
        with pytest.raises(UsageError, match="--revision"):
            get(name, key="mine", revision="main")
        assert not home.exists()

    def test_what_is_in_the_way_is_not_removed(self, tiny_checkpoint, home):
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
