"""An installed model's codes change their layout without loss."""

import os

import pytest
import torch
from care_tools import flip, mend, verify
from convert_tools import ALL_4BIT, FIRST, LAST, LAYOUTS, layout_of_target, pack, reform
from weight_tools import Meter, files_of

from mixchat.base import machine
from mixchat.base.errors import CheckpointError, ResourceError, UsageError
from mixchat.weights.format.manifest import read_manifest
from mixchat.weights.make import quantize_options as quantize_module


class TestConverting:
    @pytest.mark.parametrize(("old", "new"), [LAYOUTS, LAYOUTS[::-1]])
    @pytest.mark.parametrize("options", [{}, ALL_4BIT, {"attention": 16, "head": 16}])
    def test_it_gives_what_quantizing_straight_into_that_layout_gives(
        self, tiny_checkpoint, install, old, new, options
    ):
        installed, straight = (
            install(tiny_checkpoint, layout=layout, **options) for layout in (old, new)
        )
        before = files_of(installed)
        assert reform(installed, new)
        assert files_of(installed) == files_of(straight)
        assert files_of(installed)[FIRST] != before[FIRST]
        assert verify(installed) == []

    @pytest.mark.parametrize(
        "options", [{"quant_type": "fp4"}, {"head": 4}, {"attention": 16, "head": 16}]
    )
    def test_every_matrix_of_a_model_whose_head_is_its_embedding(
        self, make_checkpoint, install, options
    ):
        checkpoint = make_checkpoint(
            vocab_size=128, intermediate_size=128, tie_word_embeddings=True
        )
        installed, straight = (install(checkpoint, layout=layout, **options) for layout in LAYOUTS)
        assert pack(installed)
        assert files_of(installed) == files_of(straight)

    def test_a_file_in_which_nothing_changes_is_not_written(self, tiny_checkpoint, install):
        dense = {"attention": 16, "head": 16}
        installed = install(tiny_checkpoint, layout="bitsandbytes", **dense)
        before = {path.name: path.stat().st_ino for path in installed.iterdir()}
        pack(installed)
        changed = {
            path.name for path in installed.iterdir() if path.stat().st_ino != before[path.name]
        }
        assert {FIRST, LAST} == {name for name in changed if name.endswith(".safetensors")}

    def test_the_bar_counts_every_byte_that_is_rewritten(self, installed):
        meter = Meter()
        pack(installed, meter)
        bar = meter.bar("converting mine")
        assert 0 < bar.done == bar.total
        assert bar.closed

    def test_the_disk_that_it_takes_is_said_beforehand(self, installed):
        meter = Meter()
        pack(installed, meter)
        assert meter.notes[0].startswith("converting takes 1")
        assert " free" in meter.notes[0]


class TestNothingToDo:
    def test_a_model_that_has_the_layout_is_left_alone(self, installed):
        before = files_of(installed)
        assert not reform(installed, "bitsandbytes")
        assert files_of(installed) == before

    def test_one_without_4_bits_is_refused(self, tiny_checkpoint, install):
        dense = install(tiny_checkpoint, quant_type="none", layout="bitsandbytes")
        before = files_of(dense)
        with pytest.raises(UsageError, match="in 3 or 4 bits"):
            pack(dense)
        assert files_of(dense) == before

    @pytest.mark.parametrize("best", LAYOUTS)
    def test_without_a_layout_it_takes_the_one_that_this_machine_computes_fastest(
        self, installed, monkeypatch, best
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(quantize_module, "kernels_available", lambda: best == "cpu-packed")
        assert layout_of_target(installed, None) == best
        assert layout_of_target(installed, "bitsandbytes") == "bitsandbytes"


class TestDisk:
    def test_without_room_for_the_new_files_it_does_not_begin(self, installed, monkeypatch):
        before = files_of(installed)
        monkeypatch.setattr(machine, "free_disk", lambda directory: 16_000_000)
        with pytest.raises(ResourceError, match="not enough disk"):
            pack(installed)
        assert files_of(installed) == before

    def test_room_for_the_new_files_is_enough(self, installed, monkeypatch):
        size = read_manifest(installed).size
        monkeypatch.setattr(machine, "free_disk", lambda directory: 16_000_000 + size)
        assert pack(installed)


class TestDamage:
    def test_it_is_named_before_anything_is_changed(self, both, installed):
        flip(installed / "shared.safetensors", -1)
        before = files_of(installed)
        with pytest.raises(CheckpointError, match=r"lm_head\.codes is damaged") as caught:
            pack(installed)
        assert "mixchat repair" in (caught.value.hint or "")
        assert files_of(installed) == before

    def test_a_model_is_repaired_though_a_conversion_of_it_is_unfinished(
        self, both, installed, tiny_checkpoint
    ):
        flip(installed / LAST, -5000)
        with pytest.raises(CheckpointError, match=f"{LAST}: 3\\.w"):
            pack(installed)
        mend(installed, tiny_checkpoint)
        assert files_of(installed) == files_of(both["bitsandbytes"])
        assert pack(installed)
        assert files_of(installed) == files_of(both["cpu-packed"])

    def test_a_file_that_is_missing_or_cut_short_is_named(self, installed):
        os.truncate(installed / FIRST, 5000)
        with pytest.raises(CheckpointError, match=f"{FIRST}: 5000 bytes"):
            pack(installed)
        (installed / FIRST).unlink()
        with pytest.raises(CheckpointError, match=f"{FIRST}: the file is missing"):
            pack(installed)

    def test_a_manifest_of_another_model_is_refused(self, installed):
        config = (installed / "config.json").read_text()
        (installed / "config.json").write_text(
            config.replace('hidden_layers": 2', 'hidden_layers": 3')
        )
        with pytest.raises(CheckpointError):
            pack(installed)
