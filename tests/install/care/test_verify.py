"""Any damaged byte of an installed model is found and named."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
from care_tools import EXPERTS, SHARED, flip, verify
from weight_tools import Meter

from mixchat.base.errors import CheckpointError
from mixchat.base.safetensors import SafetensorsFile
from mixchat.install.care.repair import HEADER, MISSING, SIZE, Damage
from mixchat.install.care.repair import verify as verify_model
from mixchat.weights.format.manifest import (
    MANIFEST_COPY,
    MANIFEST_FILE,
    read_either_manifest,
    read_manifest,
)


def at(path: Path, offset: int) -> str:
    """Return the name of the tensor with this byte, or `HEADER`."""
    with SafetensorsFile(path) as file:
        for spec in file.header.specs:
            start = file.header.start(spec.name)
            if start <= offset < start + spec.nbytes:
                return spec.name
    return HEADER


class TestFinding:
    def test_a_whole_model_has_no_damage_and_every_byte_was_read(self, made):
        meter = Meter()
        assert verify_model(made, meter) == []
        bar = meter.bar("verifying")
        assert bar.done == bar.total == read_manifest(made).size
        assert bar.closed

    @pytest.mark.parametrize("name", [SHARED, EXPERTS, "experts-001.safetensors"])
    def test_a_flipped_byte_anywhere_is_named_with_its_tensor(self, installed, name):
        path, draw = installed / name, random.Random(name)
        size = path.stat().st_size
        for offset in (0, 8, size - 1, *(draw.randrange(size) for _ in range(8))):
            what = at(path, offset)
            flip(path, offset)
            assert verify(installed) == [Damage(name, what)], offset
            flip(path, offset)

    def test_a_flipped_byte_of_any_small_file_is_named(self, installed):
        for name in sorted(set(os.listdir(installed)) - set(os.listdir(installed.parent))):
            if name.endswith(".safetensors"):
                continue
            for offset in (0, (installed / name).stat().st_size // 2, -1):
                flip(installed / name, offset)
                assert verify(installed) == [Damage(name)], (name, offset)
                flip(installed / name, offset)

    def test_a_file_cut_short_is_named_with_what_is_gone(self, installed):
        size = (installed / EXPERTS).stat().st_size
        last = at(installed / EXPERTS, size - 1)
        os.truncate(installed / EXPERTS, size - 1)
        assert verify(installed) == [Damage(EXPERTS, SIZE), Damage(EXPERTS, last)]
        os.truncate(installed / EXPERTS, 10)
        with SafetensorsFile(installed / SHARED):
            pass
        names = [spec.name for spec in specs_of(installed, EXPERTS)]
        found = [Damage(EXPERTS, what) for what in (SIZE, HEADER, *names)]
        assert verify(installed) == found

    def test_an_overlong_file_is_named(self, installed):
        with open(installed / EXPERTS, "ab") as file:
            file.write(b"!")
        assert verify(installed) == [Damage(EXPERTS, SIZE)]

    @pytest.mark.parametrize(
        "damage",
        [
            *(Damage(name, MISSING) for name in (SHARED, EXPERTS)),
            *map(Damage, ("generation_config.json", MANIFEST_COPY, MANIFEST_FILE)),
        ],
    )
    def test_a_missing_file_is_named(self, installed, damage):
        (installed / damage.file).unlink()
        assert verify(installed) == [damage]

    def test_with_a_damaged_config_nothing_can_be_said_of_the_weights(self, installed):
        (installed / "config.json").write_bytes(b"{}")
        flip(installed / EXPERTS, -1)
        assert verify(installed) == [Damage("config.json")]


def specs_of(directory: Path, name: str) -> list[Any]:
    from mixchat.weights.families.read_config import read_config_file
    from mixchat.weights.format.blueprint import Blueprint, Quantization

    manifest = read_either_manifest(directory)
    config = read_config_file(directory / "config.json")
    blueprint = Blueprint(config, Quantization.from_description(manifest.quantization))
    return blueprint.files()[name]


class TestManifest:
    @pytest.mark.parametrize("name", [MANIFEST_FILE, MANIFEST_COPY])
    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: b"",
            lambda data: data[:-20],
            lambda data: data.replace(b'"nf4"', b'"nf3"'),
            lambda data: data.replace(b"  ", b" "),
        ],
    )
    def test_either_is_damaged_and_the_other_tells(self, installed, made, name, damage):
        (installed / name).write_bytes(damage((installed / name).read_bytes()))
        assert verify(installed) == [Damage(name)]

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda path: path.write_bytes(b"{}"), MANIFEST_FILE),
            (Path.unlink, "not a finished model"),
        ],
        ids=["damaged", "missing"],
    )
    def test_without_both_nothing_can_be_said(self, installed, spoil, message):
        for name in (MANIFEST_FILE, MANIFEST_COPY):
            spoil(installed / name)
        with pytest.raises(CheckpointError, match=message):
            verify(installed)
