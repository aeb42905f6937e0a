"""Attention and head of an installed model get 8 bits, as if it had been downloaded so."""

import os
import shutil
from pathlib import Path

import pytest
from care_tools import flip, mend, verify
from convert_tools import ALL_4BIT, DENSE, EIGHT, SHARED, reform
from weight_tools import Meter, files_of

from mixchat.base import machine
from mixchat.base.errors import CheckpointError, ResourceError, UsageError
from mixchat.base.options import DenseBits
from mixchat.weights.format.manifest import read_manifest


class TestRounding:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"tie_word_embeddings": True},
            {"model_type": "granitemoe", "tie_word_embeddings": True},
            {"model_type": "gpt_oss"},
        ],
        ids=["plain", "tied", "with multipliers", "with biases"],
    )
    @pytest.mark.parametrize(
        ("bits", "options"),
        [
            (EIGHT, {}),
            (DenseBits(attention=8), {"head": 16}),
            (DenseBits(head=8), {"attention": 16}),
            (DenseBits(8, 16), {"head": 16}),
            (DenseBits(6, 5), {"attention": 6, "head": 5}),
        ],
    )
    @pytest.mark.parametrize("stored_as", ["float32", "bfloat16"])
    def test_it_gives_what_a_download_gives(
        self, make_checkpoint, install, changes, bits, options, stored_as
    ):
        checkpoint = make_checkpoint(stored_as=stored_as, **changes)
        installed = install(checkpoint, **DENSE)
        assert reform(installed, bits)
        assert files_of(installed) == files_of(install(checkpoint, **options))
        assert verify(installed) == []
        assert not reform(installed, bits)

    def test_only_the_file_that_changes_is_written_and_is_there_twice(self, dense, monkeypatch):
        before = {path.name: path.stat().st_ino for path in dense.iterdir()}
        size = read_manifest(dense).weights["shared.safetensors"].size
        monkeypatch.setattr(machine, "free_disk", lambda directory: 16_000_000 + size)
        meter = Meter()
        assert reform(dense, EIGHT, meter)
        changed = {path.name for path in dense.iterdir() if path.stat().st_ino != before[path.name]}
        assert {name for name in changed if name.endswith(".safetensors")} == {"shared.safetensors"}
        bar = meter.bar("converting mine")
        assert 0 < bar.done == bar.total
        assert bar.closed
        assert meter.notes[0].startswith("converting takes 1")
        assert " free" in meter.notes[0]
        assert read_manifest(dense).weights["shared.safetensors"].size < size

    @pytest.mark.parametrize(
        ("options", "bits", "said"),
        [
            ({}, DenseBits(16, 16), "the attention of 'mine' has 8 bits"),
            ({}, DenseBits(head=4), "the head of 'mine' has 8 bits"),
            (ALL_4BIT, EIGHT, "the attention of 'mine' has 4 bits"),
            (ALL_4BIT, DenseBits(head=16), "the head of 'mine' has 4 bits"),
            (DENSE, DenseBits(4, 4), "the attention of 'mine' has 16 bits"),
            ({}, DenseBits(6, 6), "the attention of 'mine' has 8 bits"),
            ({"attention": 5, "head": 5}, EIGHT, "the attention of 'mine' has 5 bits"),
            ({"attention": 16}, EIGHT, None),
            ({"attention": 4}, DenseBits(4, 8), None),
        ],
    )
    def test_only_16_bits_can_become_fewer(
        self, tiny_checkpoint, install, tmp_path, options, bits, said
    ):
        made = install(tiny_checkpoint, **options)
        installed = Path(shutil.copytree(made, tmp_path / "mine"))
        before = files_of(installed)
        if said is None:
            reform(installed, bits)
            return
        with pytest.raises(UsageError, match=said):
            reform(installed, bits)
        assert files_of(installed) == before

    def test_a_finished_one_is_repaired_from_its_checkpoint(self, dense, tiny_checkpoint):
        """The checkpoint is in fp32, the model that was rounded had 16 bits."""
        reform(dense)
        converted = files_of(dense)
        (dense / "shared.safetensors").unlink()
        mend(dense, tiny_checkpoint)
        assert files_of(dense) == converted


class TestRefused:
    def test_one_without_4_bits(self, tiny_checkpoint, install):
        unquantized = install(tiny_checkpoint, quant_type="none")
        before = files_of(unquantized)
        with pytest.raises(UsageError, match="in 3 or 4 bits"):
            reform(unquantized)
        assert files_of(unquantized) == before

    def test_without_room_for_the_new_files(self, dense, monkeypatch):
        before = files_of(dense)
        monkeypatch.setattr(machine, "free_disk", lambda directory: 16_000_000)
        with pytest.raises(ResourceError, match="not enough disk"):
            reform(dense)
        assert files_of(dense) == before

    def test_a_damaged_tensor_before_anything_is_changed(self, dense):
        flip(dense / SHARED, -1)
        before = files_of(dense)
        with pytest.raises(CheckpointError, match=r"lm_head\.weight is damaged") as caught:
            reform(dense)
        assert "mixchat repair" in (caught.value.hint or "")
        assert files_of(dense) == before

    def test_a_damaged_model_is_repaired_though_its_conversion_is_unfinished(
        self, dense, tiny_checkpoint, install
    ):
        whole = files_of(dense)
        flip(dense / SHARED, -1)
        with pytest.raises(CheckpointError, match="lm_head"):
            reform(dense)
        mend(dense, tiny_checkpoint)
        assert files_of(dense) == whole
        assert reform(dense)
        assert files_of(dense) == files_of(install(tiny_checkpoint))

    def test_a_file_that_is_missing_or_cut_short(self, dense):
        os.truncate(dense / SHARED, 5000)
        with pytest.raises(CheckpointError, match=f"{SHARED}: 5000 bytes"):
            reform(dense)
        (dense / SHARED).unlink()
        with pytest.raises(CheckpointError, match=f"{SHARED}: the file is missing"):
            reform(dense)

    def test_a_manifest_of_another_model(self, dense):
        config = (dense / "config.json").read_text()
        (dense / "config.json").write_text(config.replace('hidden_layers": 2', 'hidden_layers": 3'))
        with pytest.raises(CheckpointError):
            reform(dense)
