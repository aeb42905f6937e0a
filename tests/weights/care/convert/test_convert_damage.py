"""A damaged model is not converted, and can be repaired in the middle of a conversion."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from care_tools import flip, mend, verify
from convert_tools import FIRST, LAST, pack
from weight_tools import files_of

from mixchat.base.errors import CheckpointError


class TestDamage:
    def test_it_is_named_before_anything_is_changed(
        self, both: dict[str, Path], installed: Path
    ) -> None:
        flip(installed / "shared.safetensors", -1)
        before = files_of(installed)
        with pytest.raises(CheckpointError, match=r"lm_head\.codes is damaged") as caught:
            pack(installed)
        assert "mixchat repair" in (caught.value.hint or "")
        assert files_of(installed) == before

    def test_in_the_middle_it_is_repaired_in_the_layout_of_its_file(
        self, both: dict[str, Path], installed: Path, tiny_checkpoint: Path
    ) -> None:
        flip(installed / LAST, -5000)
        with pytest.raises(CheckpointError, match=f"{LAST}: 3\\.w"):
            pack(installed)
        flip(installed / FIRST, 5000)  # which is converted already
        damaged = verify(installed)
        assert [damage.file for damage in damaged] == [FIRST, LAST]
        mend(installed, tiny_checkpoint)
        assert verify(installed) == []
        assert pack(installed)
        assert files_of(installed) == files_of(both["cpu-packed"])

    def test_a_file_that_is_missing_or_cut_short_is_named(self, installed: Path) -> None:
        os.truncate(installed / FIRST, 5000)
        with pytest.raises(CheckpointError, match=f"{FIRST}: 5000 bytes"):
            pack(installed)
        (installed / FIRST).unlink()
        with pytest.raises(CheckpointError, match=f"{FIRST}: the file is missing"):
            pack(installed)

    def test_a_header_that_names_others_is_refused(self, installed: Path) -> None:
        data = (installed / "shared.safetensors").read_bytes()
        (installed / "shared.safetensors").write_bytes(data.replace(b"model.norm.", b"model.harm."))
        with pytest.raises(CheckpointError, match="not those of this model"):
            pack(installed)

    def test_a_manifest_of_another_model_is_refused(self, installed: Path) -> None:
        config = (installed / "config.json").read_text()
        (installed / "config.json").write_text(
            config.replace('hidden_layers": 2', 'hidden_layers": 3')
        )
        with pytest.raises(CheckpointError):
            pack(installed)
