"""Leftovers are removed, but nothing that mixchat did not write or that is being worked on."""

import shutil
from pathlib import Path

import pytest
from weight_tools import FOREIGN, files_of, write_files

from mixchat.base.errors import ModelNotFoundError, UsageError
from mixchat.base.lock import exclusive_lock
from mixchat.base.machine import disk_usage
from mixchat.install import models
from mixchat.install.care.housekeeping import Leftover, remove, sweep
from mixchat.weights.format.journal import JOURNAL_FILE
from mixchat.weights.format.workspace import workspace

# A workspace, and a file that was being written when its process was killed.
WORK = {
    "source/model-00001.safetensors.mixchat.part": b"x" * 10_000,
    "model/shared.safetensors": b"x" * 10_000,
    "spill-model-00001.safetensors": b"x" * 5_000,
    "inputs.mixchat.tmp/inputs-000": b"x",
}
JUNK = {"mixchat.json.mixchat.tmp": b"{", "config.json.mixchat.tmp": b"{"}


@pytest.fixture(autouse=True)
def home(home: Path, cache: Path) -> Path:
    models.models_dir().mkdir(parents=True)
    return home


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
    """The workspace of a download."""
    place = workspace(models.models_dir() / "half")
    write_files(place, {**WORK, JOURNAL_FILE: b'{"base": null}\n'})
    return place


def found(**options: bool) -> dict[str, str]:
    """Sweep, and return the states of all that it found, by their paths below the models."""
    base = models.models_dir()
    return {str(leftover.path.relative_to(base)): leftover.state for leftover in sweep(**options)}


class TestRemoving:
    def test_a_finished_model_is_gone_and_nothing_else(self, finished, unfinished, precious):
        remove(finished)
        assert list(models.models_dir().iterdir()) == [unfinished]
        assert (precious / "file").exists()

    def test_an_unfinished_one_too(self, finished, unfinished):
        remove(models.models_dir() / "half")
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
        remove(models.models_dir() / "half")
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


class TestLeftovers:
    def test_a_clean_directory_has_none(self, finished):
        assert found() == {}
        assert list(models.models_dir().iterdir()) == [finished]

    def test_no_directory_has_none(self, home):
        shutil.rmtree(home)
        assert list(sweep()) == []

    def test_of_a_finished_model_are_all_that_it_does_not_need(self, finished):
        before = files_of(finished)
        write_files(finished, JUNK)
        write_files(workspace(finished), WORK)
        assert found() == {
            workspace(finished).name: "removed",
            **{f"done/{name}": "removed" for name in JUNK},
        }
        assert files_of(finished) == before

    def test_an_unfinished_model_can_be_gone_on_with(self, unfinished):
        size = disk_usage(unfinished)
        assert list(sweep()) == [Leftover(unfinished, size, "resumable")]
        assert size > 20_000
        (leftover,) = sweep(unfinished=True)
        assert leftover == Leftover(unfinished, size, "removed")
        assert not unfinished.exists()

    def test_one_that_says_nothing_of_what_it_was_cannot(self, unfinished):
        (unfinished / JOURNAL_FILE).unlink()
        assert found() == {unfinished.name: "removed"}
        assert not unfinished.exists()

    def test_a_lock_of_a_killed_process_is_removed_by_looking(self, finished):
        for name in (".done.mixchat.lock", ".gone.mixchat.lock"):
            (models.models_dir() / name).write_text("")
        assert found() == {}
        assert list(models.models_dir().iterdir()) == [finished]

    def test_a_model_in_use_is_left_alone_and_its_lock(self, unfinished):
        """Found and removed were once two steps; a download that began between them was lost."""
        with exclusive_lock(models.models_dir() / "half"):
            assert found() == found(unfinished=True) == {}
            assert unfinished.exists()
            assert (models.models_dir() / ".half.mixchat.lock").exists()

    def test_links_and_strange_names_are_left_alone(self, precious):
        write_files(precious, JUNK)
        (models.models_dir() / "link").symlink_to(precious)
        write_files(models.models_dir() / "....mixchat.unfinished", JUNK)
        (models.models_dir() / "a file").write_text("mine")
        (models.models_dir() / ".hidden").mkdir()
        assert found(unfinished=True) == {"a file": "foreign", "link": "foreign"}
        assert (models.models_dir() / "a file").exists()
        assert {name: (precious / name).read_bytes() for name in JUNK} == JUNK

    def test_a_link_among_them_is_removed_not_followed(self, finished, precious):
        workspace(finished).symlink_to(precious)
        assert found() == {workspace(finished).name: "removed"}
        assert not workspace(finished).is_symlink()
        assert (precious / "file").read_text() == "precious"


class TestForeignFiles:
    """A directory in models/ without a manifest was removed without a question."""

    def test_directories_and_checkpoints_without_a_mark_stay(self, finished, tiny_checkpoint):
        write_files(models.models_dir() / "notes", FOREIGN)
        shutil.copytree(tiny_checkpoint, models.models_dir() / "mine")
        (models.models_dir() / "empty").mkdir()
        before = files_of(models.models_dir())
        expected = {"empty": "foreign", "mine": "foreign", "notes": "foreign"}
        assert found(unfinished=True) == expected
        assert files_of(models.models_dir()) == before
        assert (models.models_dir() / "empty").is_dir()

    def test_those_in_an_installed_model_stay_and_are_named(self, finished):
        before = files_of(finished)
        write_files(finished, JUNK | FOREIGN)
        swept = found(unfinished=True)
        foreign = {name for name, state in swept.items() if state == "foreign"}
        assert foreign == {f"done/{name.partition('/')[0]}" for name in FOREIGN}
        assert files_of(finished) == before | FOREIGN

    def test_a_small_file_that_the_manifest_does_not_list_is_foreign(self, finished):
        write_files(finished, {"chat_template.jinja": b"mine"})
        assert remove(finished) == [finished / "chat_template.jinja"]
        assert files_of(finished) == {"chat_template.jinja": b"mine"}

    def test_those_in_a_removed_model_stay_and_are_named(self, finished):
        write_files(finished, JUNK | FOREIGN)
        stay = remove(finished)
        assert {path.name for path in stay} == {name.partition("/")[0] for name in FOREIGN}
        assert files_of(finished) == FOREIGN

    def test_a_model_whose_manifests_are_damaged_is_removed_as_a_whole(self, finished):
        for name in ("mixchat.json", "mixchat.copy.json"):
            (finished / name).write_bytes(b"{")
        assert remove(finished) == []
        assert not finished.exists()

    def test_a_directory_without_a_mark_is_no_model_to_remove(self):
        write_files(models.models_dir() / "notes", FOREIGN)
        with pytest.raises(ModelNotFoundError):
            remove(models.models_dir() / "notes")
        assert files_of(models.models_dir() / "notes") == FOREIGN

    def test_a_lock_file_of_another_program_stays(self, home):
        (models.models_dir() / ".thesis.lock").write_text("of an editor")
        assert found() == {}
        assert (models.models_dir() / ".thesis.lock").read_text() == "of an editor"
