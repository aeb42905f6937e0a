"""The manifest: what is said where it, its copy, or both cannot be read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mixchat.errors import CheckpointError
from mixchat.weights.format.manifest import MANIFEST_COPY, MANIFEST_FILE, check_files, read_manifest

DAMAGES = ["", "{", "[1]", '{"format": 2}', '{"format": 2, "sha256": "0"}']


@pytest.fixture
def kept(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model among the installed ones, which may be written into."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    target = tmp_path / "models" / "mine"
    shutil.copytree(tiny_model, target)
    return target


def hint_of(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_files(directory, read_manifest(directory))
    return caught.value.hint or ""


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_has_a_copy_from_which_repair_makes_it_again(
    kept: Path, damage: str
) -> None:
    """A broken one came without a hint, though `repair` mends it."""
    (kept / MANIFEST_FILE).write_text(damage)
    assert "mixchat repair mine" in hint_of(kept)


def test_a_missing_manifest_too(kept: Path) -> None:
    (kept / MANIFEST_FILE).unlink()
    assert "mixchat repair mine" in hint_of(kept)


@pytest.mark.parametrize("damage", DAMAGES)
def test_with_the_copy_damaged_too_only_a_new_download_helps(kept: Path, damage: str) -> None:
    for name in (MANIFEST_FILE, MANIFEST_COPY):
        (kept / name).write_text(damage)
    assert "mixchat rm mine" in hint_of(kept)
    assert "download" in hint_of(kept)
    assert "mixchat repair" not in hint_of(kept)


def test_a_damaged_file_is_mended_by_its_models_name(kept: Path) -> None:
    """The hint had the word MODEL where the name has to stand."""
    (kept / "experts-001.safetensors").unlink()
    assert hint_of(kept) == "Run: mixchat repair mine (it fetches only what is damaged)."


def test_repair_is_not_offered_where_it_cannot_help(kept: Path, tmp_path: Path) -> None:
    """It mends models in the data directory alone."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(kept, elsewhere)
    (elsewhere / "experts-001.safetensors").unlink()
    assert hint_of(elsewhere).startswith("Copy it again: ")
