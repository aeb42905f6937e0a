"""Any damaged byte of a kept model is found and named."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from weight_tools import Meter, files_of

from mixchat.errors import CheckpointError
from mixchat.progress import NoProgress
from mixchat.safetensors import SafetensorsFile
from mixchat.weights.care.verify import HEADER, MISSING, SIZE, Damage
from mixchat.weights.care.verify import verify as verify_model
from mixchat.weights.format.manifest import (
    MANIFEST_COPY,
    MANIFEST_FILE,
    read_either_manifest,
    read_manifest,
    restore_manifests,
)

EXPERTS = "experts-000.safetensors"
SHARED = "shared.safetensors"


@pytest.fixture
def kept(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "kept"))


def verify(directory: Path) -> list[Damage]:
    return verify_model(directory, NoProgress())


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def at(path: Path, offset: int) -> str:
    """What lies there: a tensor's name, or the header."""
    with SafetensorsFile(path) as file:
        for spec in file.header.specs:
            start = file.header.start(spec.name)
            if start <= offset < start + spec.nbytes:
                return spec.name
    return HEADER


class TestFinding:
    def test_a_whole_model_has_no_damage_and_every_byte_was_read(self, made: Path) -> None:
        meter = Meter()
        assert verify_model(made, meter) == []
        bar = meter.bar("verifying")
        assert bar.done == bar.total == read_manifest(made).size
        assert bar.closed

    @pytest.mark.parametrize("name", [SHARED, EXPERTS, "experts-001.safetensors"])
    def test_a_flipped_byte_anywhere_is_named_with_its_tensor(self, kept: Path, name: str) -> None:
        path, draw = kept / name, random.Random(name)
        size = path.stat().st_size
        for offset in (0, 8, size - 1, *(draw.randrange(size) for _ in range(8))):
            what = at(path, offset)
            flip(path, offset)
            assert verify(kept) == [Damage(name, what)], offset
            flip(path, offset)

    def test_a_flipped_byte_of_any_small_file_is_named(self, kept: Path) -> None:
        for name in sorted(set(os.listdir(kept)) - set(os.listdir(kept.parent))):
            if name.endswith(".safetensors"):
                continue
            for offset in (0, (kept / name).stat().st_size // 2, -1):
                flip(kept / name, offset)
                assert verify(kept) == [Damage(name)], (name, offset)
                flip(kept / name, offset)

    def test_several_damages_are_all_named(self, kept: Path) -> None:
        for name in (SHARED, EXPERTS):
            for offset in (5000, -1):
                flip(kept / name, offset)
        found = {(damage.file, damage.what) for damage in verify(kept)}
        assert found == {
            (name, at(kept / name, offset % (kept / name).stat().st_size))
            for name in (SHARED, EXPERTS)
            for offset in (5000, -1)
        }

    def test_a_file_cut_short_is_named_with_what_is_gone(self, kept: Path) -> None:
        size = (kept / EXPERTS).stat().st_size
        last = at(kept / EXPERTS, size - 1)
        os.truncate(kept / EXPERTS, size - 1)
        assert verify(kept) == [Damage(EXPERTS, SIZE), Damage(EXPERTS, last)]
        os.truncate(kept / EXPERTS, 10)
        with SafetensorsFile(kept / SHARED):
            pass
        names = [spec.name for spec in specs_of(kept, EXPERTS)]
        found = [Damage(EXPERTS, what) for what in (SIZE, HEADER, *names)]
        assert verify(kept) == found

    def test_an_overlong_file_is_named(self, kept: Path) -> None:
        with open(kept / EXPERTS, "ab") as file:
            file.write(b"!")
        assert verify(kept) == [Damage(EXPERTS, SIZE)]

    @pytest.mark.parametrize("name", [SHARED, EXPERTS])
    def test_a_missing_file_of_weights_is_named(self, kept: Path, name: str) -> None:
        (kept / name).unlink()
        assert verify(kept) == [Damage(name, MISSING)]

    @pytest.mark.parametrize("name", ["generation_config.json", MANIFEST_COPY, MANIFEST_FILE])
    def test_a_missing_small_file_is_named(self, kept: Path, name: str) -> None:
        (kept / name).unlink()
        assert verify(kept) == [Damage(name)]

    def test_with_a_damaged_config_nothing_can_be_said_of_the_weights(self, kept: Path) -> None:
        (kept / "config.json").write_bytes(b"{}")
        flip(kept / EXPERTS, -1)
        assert verify(kept) == [Damage("config.json")]

    def test_a_damage_says_what_and_where(self) -> None:
        assert str(Damage("a", "b")) == "a: b"
        assert str(Damage("a")) == "a"


def specs_of(directory: Path, name: str) -> list[Any]:
    from mixchat.model_config import ModelConfig
    from mixchat.weights.format.blueprint import Blueprint, Quantization

    manifest = read_either_manifest(directory)
    config = ModelConfig.from_file(directory / "config.json")
    blueprint = Blueprint(config, Quantization.described(manifest.quantization))
    return blueprint.files()[name]


class TestManifest:
    @pytest.mark.parametrize("name", [MANIFEST_FILE, MANIFEST_COPY])
    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[:-20],
            lambda data: data.replace(b'"nf4"', b'"fp4"'),
            lambda data: data.replace(b"  ", b" "),
        ],
    )
    def test_either_is_damaged_and_the_other_tells(
        self, kept: Path, made: Path, name: str, damage: Callable[[bytes], bytes]
    ) -> None:
        (kept / name).write_bytes(damage((kept / name).read_bytes()))
        assert verify(kept) == [Damage(name)]

    @pytest.mark.parametrize("name", [MANIFEST_FILE, MANIFEST_COPY])
    def test_the_whole_one_is_written_over_the_other_and_no_source_is_needed(
        self, kept: Path, made: Path, name: str
    ) -> None:
        flip(kept / name, -1)
        restore_manifests(kept)
        assert files_of(kept) == files_of(made)

    def test_both_are_damaged(self, kept: Path) -> None:
        for name in (MANIFEST_FILE, MANIFEST_COPY):
            (kept / name).write_bytes(b"{}")
        with pytest.raises(CheckpointError, match=MANIFEST_FILE):
            verify(kept)

    def test_neither_is_there(self, kept: Path) -> None:
        for name in (MANIFEST_FILE, MANIFEST_COPY):
            (kept / name).unlink()
        with pytest.raises(CheckpointError, match="not a finished model"):
            verify(kept)

    def test_one_that_lies_about_a_hash_is_damaged_by_its_own(self, kept: Path) -> None:
        raw = json.loads((kept / MANIFEST_FILE).read_bytes())
        raw["files"]["config.json"]["sha256"] = "0" * 64
        (kept / MANIFEST_FILE).write_text(json.dumps(raw))
        with pytest.raises(CheckpointError, match="damaged"):
            read_manifest(kept)
