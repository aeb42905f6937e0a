"""`rm`, `verify`, `repair` and `gc`."""

import os
import shutil
from pathlib import Path

import pytest
from care_tools import flip
from command_line import FAKE
from fake_hub import COMMIT, REPO, FakeHub
from terminal import Terminal

from mixchat.base.lock import exclusive_lock
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.weights.format.journal import JOURNAL_FILE
from mixchat.weights.format.manifest import Source
from mixchat.weights.format.workspace import SOURCE_DIR, workspace


@pytest.fixture
def models(environment):
    directory = Path(environment["MIXCHAT_HOME"]) / "models"
    directory.mkdir(parents=True)
    return directory


@pytest.fixture(scope="module")
def from_hub(tiny_checkpoint, tmp_path_factory):
    target = tmp_path_factory.mktemp("from-hub") / "installed"
    checkpoint = DirectoryCheckpoint(tiny_checkpoint, Source(REPO, COMMIT))
    CheckpointBuild(checkpoint, target, make_blueprint(checkpoint.index, QuantizeOptions())).run()
    return target


@pytest.fixture
def installed(from_hub, models):
    return Path(shutil.copytree(from_hub, models / "mine"))


@pytest.fixture
def half(models):
    place = workspace(models / "half")
    place.mkdir()
    (place / JOURNAL_FILE).write_bytes(b'{"base": null}\n')
    return place


def lines_of(done):
    return done.stderr.decode().splitlines()


class TestRm:
    def test_what_mixchat_did_not_write_is_named_and_stays(self, mixchat, installed, models):
        for name in ("thesis.txt", "chat_template.jinja"):
            (installed / name).write_text("years")
        caches = models.parent / "server" / "mine"
        caches.mkdir(parents=True)
        (caches / "0.kv").write_bytes(b"x")
        (caches / "notes").write_text("years")
        done = mixchat("rm", "mine", "--yes")
        assert done.returncode == 0
        assert {path.name for path in installed.iterdir()} == {"thesis.txt", "chat_template.jinja"}
        assert lines_of(done)[1:] == [
            f"left: {installed / name}, which mixchat did not write"
            for name in ("chat_template.jinja", "thesis.txt")
        ]
        assert [path.name for path in caches.iterdir()] == ["notes"]
        assert mixchat("rm", "mine", "--yes").returncode == 4
        assert (installed / "thesis.txt").read_text() == "years"
        assert mixchat("list").stdout == b""

    def test_with_yes_it_does_not_ask_and_takes_what_was_counted_of_its_last_run(
        self, mixchat, installed, models
    ):
        report = models.parent / "stats" / "mine.json"
        report.parent.mkdir()
        report.write_text("{}")
        done = mixchat("rm", "mine", "--yes")
        assert (done.stdout, done.returncode) == (b"", 0)
        assert lines_of(done)[0].startswith("removed mine: ")
        assert os.listdir(models) == []
        assert not report.exists()

    def test_where_nobody_can_be_asked_it_does_nothing(self, mixchat, installed):
        done = mixchat("rm", "mine", stdin=b"y\n")
        assert done.returncode == 2
        assert "--yes" in lines_of(done)[1]
        assert (installed / "mixchat.json").exists()

    @pytest.mark.parametrize(("answer", "gone"), [("y\n", True), ("n\n", False), ("\n", False)])
    def test_on_a_terminal_it_asks_and_no_is_the_default(
        self, environment, installed, answer, gone
    ):
        with Terminal([*FAKE, "rm", "mine"], environment) as terminal:
            question = terminal.wait_for("]:")
            assert "Remove mine (" in question
            terminal.type(answer)
            code = terminal.wait_for_end()
        assert installed.exists() != gone
        assert (code == 0) == gone


class TestVerify:
    def test_a_whole_model_wherever_it_is(self, mixchat, installed, from_hub):
        done = mixchat("verify", "mine")
        assert (done.stdout, done.returncode) == (b"", 0)
        assert lines_of(done)[-1] == "mine is intact"
        assert mixchat("verify", str(from_hub)).returncode == 0

    def test_what_is_damaged_is_named_on_stdout(self, mixchat, installed):
        flip(installed / "experts-001.safetensors", -5000)
        (installed / "generation_config.json").unlink()
        done = mixchat("verify", "mine")
        assert done.returncode == 6
        assert done.stdout.decode().splitlines() == [
            "damaged: generation_config.json",
            "damaged: experts-001.safetensors: 3.w2.codes",
        ]
        error, hint = lines_of(done)[-2:]
        assert error == "error: mine is damaged (2 places)"
        assert "mixchat repair mine" in hint

    def test_no_more_than_a_screenful_is_named(self, mixchat, installed):
        for name in ("shared", "experts-000", "experts-001"):
            os.truncate(installed / f"{name}.safetensors", 0)
        lines = mixchat("verify", "mine").stdout.decode().splitlines()
        assert len(lines) == 21
        assert lines[-1].startswith("and ")


class TestRepair:
    @pytest.fixture
    def fake(self, cache, tiny_checkpoint, monkeypatch):
        with FakeHub({path.name: path.read_bytes() for path in tiny_checkpoint.iterdir()}) as hub:
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            yield hub

    def test_what_is_damaged_comes_back(self, mixchat, installed, from_hub, fake):
        flip(installed / "experts-001.safetensors", -5000)
        (installed / "config.json").unlink()
        done = mixchat("repair", "mine")
        assert done.returncode == 0
        assert b"damaged: config.json\n" in done.stdout
        assert lines_of(done)[-1] == "mine is intact again"
        for path in from_hub.iterdir():
            assert (installed / path.name).read_bytes() == path.read_bytes()
        assert mixchat("verify", "mine").returncode == 0

    @pytest.mark.parametrize("manifest", [None, b"junk"])
    def test_what_needs_no_weights_asks_the_hub_nothing(
        self, mixchat, installed, from_hub, fake, manifest
    ):
        if manifest:
            (installed / "mixchat.json").write_bytes(manifest)
        done = mixchat("repair", "mine")
        assert lines_of(done)[-1] == f"mine is intact{' again' if manifest else ''}"
        assert not fake.requests
        assert (installed / "mixchat.json").read_bytes() == (from_hub / "mixchat.json").read_bytes()

    def test_one_in_use_is_refused(self, mixchat, installed, fake):
        with exclusive_lock(installed):
            assert mixchat("repair", "mine").returncode == 2


@pytest.mark.parametrize("command", ["verify", "repair"])
def test_an_unfinished_model_is_to_be_downloaded(mixchat, half, command):
    done = mixchat(command, "half")
    assert done.returncode == 4
    assert "mixchat download half" in done.stderr.decode()


class TestGc:
    @pytest.fixture(autouse=True)
    def no_cache(self, cache):
        """Not this machine's own."""

    def test_leftovers_go_and_work_to_go_on_with_stays(self, mixchat, installed, half, models):
        source = workspace(installed) / SOURCE_DIR
        source.mkdir(parents=True)
        (source / "model.safetensors").write_bytes(b"x" * 100_000)
        (models / ".gone.mixchat.lock").write_text("")
        done = mixchat("gc")
        lines = lines_of(done)
        assert [line.split()[0] for line in lines] == ["left:", "removed:", "freed"]
        assert "which the same command can resume" in lines[0]
        assert not source.exists()
        assert (installed / "mixchat.json").exists()
        assert half.exists()
        assert not (models / ".gone.mixchat.lock").exists()

    def test_what_mixchat_did_not_write_is_named_and_stays(self, mixchat, installed, models):
        """A directory without a manifest was removed, which may hold a person's own checkpoint."""
        thesis, checkpoint = models / "notes" / "thesis.txt", models / "myckpt" / "config.json"
        for path in (thesis, checkpoint, installed / "thesis.txt"):
            path.parent.mkdir(exist_ok=True)
            path.write_text("years")
        done = mixchat("gc", "--unfinished")
        names = ("mine/thesis.txt", "myckpt", "notes")
        assert lines_of(done) == [
            *(f"left: {models / name}, which mixchat did not write" for name in names),
            "freed 0 bytes",
        ]
        assert thesis.read_text() == checkpoint.read_text() == "years"
        assert (installed / "thesis.txt").read_text() == "years"
