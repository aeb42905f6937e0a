"""Leftovers are removed; nothing outside is, and nothing that another process is working on."""

import shutil
from pathlib import Path

import pytest
from weight_tools import files_of

from mixchat.base.errors import ModelNotFoundError, UsageError
from mixchat.base.lock import exclusive_lock
from mixchat.base.machine import disk_usage
from mixchat.weights import models
from mixchat.weights.care.housekeeping import Leftover, remove, sweep
from mixchat.weights.format.manifest import is_installed
from mixchat.weights.source import hub

JUNK = {
    "journal.jsonl": b"{}\n",
    "source/model-00001.safetensors.mixchat.part": b"x" * 10_000,
    "build/checkpoint/model.safetensors": b"x" * 10_000,
    "aside-model-00001.safetensors": b"x" * 5_000,
    "mixchat.json.tmp": b"{",
    "shared.safetensors.mixchat.part": b"x",
}


@pytest.fixture(autouse=True)
def home(no_settings: Path, cache: Path) -> Path:
    models.models_dir().mkdir(parents=True)
    return no_settings


@pytest.fixture
def precious(home: Path) -> Path:
    """A file outside, to which links lead."""
    (home / "precious").mkdir()
    (home / "precious" / "file").write_text("precious")
    return home / "precious"


@pytest.fixture
def finished(tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, models.models_dir() / "done"))


@pytest.fixture
def unfinished() -> Path:
    target = models.models_dir() / "half"
    write(target, {**JUNK, "journal.jsonl": b'{"format": 2}\n'})
    return target


def write(directory: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)


def found() -> dict[str, bool]:
    """Return the leftovers, by their paths below the models, and whether each can be resumed.

    The others are removed by this.
    """
    base = models.models_dir()
    return {str(left.path.relative_to(base)): left.resumable for left in sweep()}


class TestRemoving:
    def test_a_finished_model_is_gone_and_nothing_else(self, finished, unfinished, precious):
        remove(finished)
        assert [path.name for path in models.models_dir().iterdir()] == ["half"]
        assert (precious / "file").exists()

    def test_an_unfinished_one_too(self, finished, unfinished):
        remove(unfinished)
        assert [path.name for path in models.models_dir().iterdir()] == ["done"]

    def test_of_a_link_only_the_link_is_removed(self, precious):
        link = models.models_dir() / "link"
        link.symlink_to(precious)
        remove(link)
        assert not link.is_symlink()
        assert (precious / "file").read_text() == "precious"

    def test_what_links_inside_lead_to_stays(self, unfinished, precious):
        (unfinished / "linked").symlink_to(precious)
        (unfinished / "file").symlink_to(precious / "file")
        remove(unfinished)
        assert (precious / "file").read_text() == "precious"

    def test_one_that_is_being_made_stays(self, finished):
        before = files_of(finished)
        with exclusive_lock(finished), pytest.raises(UsageError, match="another mixchat") as caught:
            remove(finished)
        assert caught.value.hint
        assert files_of(finished) == before

    def test_one_that_is_not_here(self):
        with pytest.raises(ModelNotFoundError):
            remove(models.models_dir() / "nothing")
        (models.models_dir() / "file").write_text("")
        with pytest.raises(ModelNotFoundError):
            remove(models.models_dir() / "file")

    def test_one_whose_removal_is_cut_short_is_not_taken_for_a_model(self, finished, monkeypatch):
        def cut(path: Path) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(shutil, "rmtree", cut)
        with pytest.raises(KeyboardInterrupt):
            remove(finished)
        assert not is_installed(finished)


class TestLeftovers:
    def test_a_clean_directory_has_none(self, finished):
        assert found() == {}
        assert list(models.models_dir().iterdir()) == [finished]

    def test_no_directory_has_none(self, home):
        shutil.rmtree(home)
        assert list(sweep()) == []

    def test_of_a_finished_model_are_all_that_it_does_not_need(self, finished):
        before = files_of(finished)
        write(finished, JUNK)
        lying = found()
        assert lying == {
            f"done/{name}": False
            for name in (
                "aside-model-00001.safetensors",
                "build",
                "journal.jsonl",
                "mixchat.json.tmp",
                "shared.safetensors.mixchat.part",
                "source",
            )
        }
        assert files_of(finished) == before

    def test_an_unfinished_model_can_be_gone_on_with(self, unfinished):
        size = disk_usage(unfinished)
        assert list(sweep()) == [Leftover(unfinished, size, resumable=True)]
        assert size > 20_000
        (leftover,) = sweep(unfinished=True)
        assert leftover == Leftover(unfinished, size, resumable=True, removed=True)
        assert not unfinished.exists()

    def test_one_that_says_nothing_of_what_it_was_cannot(self, unfinished):
        (unfinished / "journal.jsonl").unlink()
        (leftover,) = sweep()
        assert leftover.removed
        assert not unfinished.exists()

    def test_a_lock_of_a_killed_process_is_removed_by_looking(self, finished):
        for name in (".done.lock", ".gone.lock"):
            (models.models_dir() / name).write_text("")
        assert found() == {}
        assert list(models.models_dir().iterdir()) == [finished]

    def test_a_model_in_use_is_left_alone_and_its_lock(self, unfinished):
        with exclusive_lock(unfinished):
            assert found() == {}
            assert (models.models_dir() / ".half.lock").exists()

    def test_links_and_strange_names_are_left_alone(self, precious):
        write(precious, JUNK)
        (models.models_dir() / "link").symlink_to(precious)
        (models.models_dir() / "a file").write_text("mine")
        (models.models_dir() / ".hidden").mkdir()
        assert found() == {}
        assert (models.models_dir() / "a file").exists()

    def test_a_link_among_them_is_removed_not_followed(self, finished, precious):
        (finished / "source").symlink_to(precious)
        assert found() == {"done/source": False}
        assert not (finished / "source").is_symlink()
        assert (precious / "file").read_text() == "precious"

    def test_parts_in_the_hubs_cache_can_be_gone_on_with(self, cache):
        blobs = hub.repo_dir("org/name") / "blobs"
        write(blobs, {"abc.mixchat.part": b"x" * 5_000, "abc": b"a blob", "d.incomplete": b"hf's"})
        (leftover,) = sweep()
        assert leftover.path == blobs / "abc.mixchat.part"
        assert leftover.resumable
        list(sweep(unfinished=True))
        assert sorted(path.name for path in blobs.iterdir()) == ["abc", "d.incomplete"]

    def test_a_part_that_is_being_fetched_stays(self, cache):
        sha256 = "ab" * 32
        blobs = hub.repo_dir("org/name") / "blobs"
        write(blobs, {f"{sha256}.mixchat.part": b"x"})
        with hub.blob_lock(blobs.parent.name, sha256, timeout=1):
            assert list(sweep(unfinished=True)) == []
        (leftover,) = sweep(unfinished=True)
        assert leftover.removed

    def test_what_another_process_has_started_meanwhile_stays(self, unfinished):
        """Found and removed were once two steps; a download that began between them was lost."""
        with exclusive_lock(unfinished):
            assert list(sweep(unfinished=True)) == []
        assert unfinished.exists()
