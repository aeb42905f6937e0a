"""The manifest: errors and hints where it, its copy, or both cannot be read."""

import shutil
from pathlib import Path

import pytest

from mixchat.base.errors import CheckpointError
from mixchat.weights.format.manifest import MANIFEST_COPY, MANIFEST_FILE, check_files, read_manifest

DAMAGES = ["", "{", "[1]", '{"format": 7}', '{"format": 7, "sha256": "0"}']


@pytest.fixture
def installed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model among the installed ones, which may be written into."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    target = tmp_path / "models" / "mine"
    shutil.copytree(tiny_model, target)
    return target


def hint_of(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_files(directory, read_manifest(directory))
    return caught.value.hint or ""


@pytest.mark.parametrize("damage", [*DAMAGES, None])
def test_a_damaged_or_missing_manifest_has_a_copy_from_which_repair_makes_it_again(
    installed, damage
):
    """A broken one came without a hint, though `repair` repairs it."""
    if damage is None:
        (installed / MANIFEST_FILE).unlink()
    else:
        (installed / MANIFEST_FILE).write_text(damage)
    assert "mixchat repair mine" in hint_of(installed)


@pytest.mark.parametrize("damage", DAMAGES)
def test_with_the_copy_damaged_too_only_a_new_download_helps(installed, damage):
    for name in (MANIFEST_FILE, MANIFEST_COPY):
        (installed / name).write_text(damage)
    assert "mixchat rm mine" in hint_of(installed)
    assert "download" in hint_of(installed)
    assert "mixchat repair" not in hint_of(installed)


def test_a_damaged_file_is_mended_by_its_models_name(installed):
    """The hint had the word MODEL where the name has to stand."""
    (installed / "experts-001.safetensors").unlink()
    assert hint_of(installed) == "Run: mixchat repair mine (it fetches only what is damaged)."


def test_repair_is_not_offered_where_it_cannot_help(installed, tmp_path):
    """It repairs models in the data directory alone."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(installed, elsewhere)
    (elsewhere / "experts-001.safetensors").unlink()
    assert hint_of(elsewhere).startswith("Copy it again: ")
