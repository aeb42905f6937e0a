"""A kept model's codes change their layout without loss, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_repair import flip, mend, verify
from weight_tools import Meter, files_of

from mixchat import machine
from mixchat.engine.sampling import SamplingOptions
from mixchat.errors import CheckpointError, ResourceError, UsageError
from mixchat.loading.loader import LoadOptions, load_engine
from mixchat.progress import NoProgress
from mixchat.safetensors import SafetensorsWriter
from mixchat.weights import models
from mixchat.weights.care import housekeeping
from mixchat.weights.care.convert import _Conversion, convert, layout_to_take
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import CONVERSION_DIR, read_manifest
from mixchat.weights.make import quantize as quantize_module
from mixchat.weights.matrix.linear import Layout

LAYOUTS: tuple[Layout, Layout] = ("bitsandbytes", "cpu-packed")
FIRST, LAST = "experts-000.safetensors", "experts-001.safetensors"
ALL_4BIT = {"attention": True, "head": True}


@pytest.fixture(scope="module")
def both(tiny_checkpoint: Path, keep: Callable[..., Path]) -> dict[str, Path]:
    """The same model quantized straight into either layout. Do not write into it."""
    return {layout: keep(tiny_checkpoint, layout=layout, **ALL_4BIT) for layout in LAYOUTS}


@pytest.fixture
def kept(both: dict[str, Path], tmp_path: Path) -> Path:
    """A copy in the layout "bitsandbytes" that a test may change."""
    return Path(shutil.copytree(both["bitsandbytes"], tmp_path / "models" / "mine"))


def pack(directory: Path, meter: Meter | None = None) -> bool:
    return convert(directory, "cpu-packed", meter or Meter())


def text_of(directory: Path) -> list[int]:
    engine = load_engine(directory, LoadOptions(device="cpu"))
    greedy = SamplingOptions(temperature=0)
    return list(engine.generate([5, 17, 42], sampling=greedy, stop_ids=set(), max_tokens=20))


class TestLoadingBeside:
    """A model that is converted while it is loaded is loaded as it was, or not at all.

    The manifest was read, then the files were opened: those that a conversion had replaced in
    between were read in the layout that they no longer had, and the text was nonsense.
    """

    @pytest.mark.parametrize("moment", ["shared.safetensors", FIRST, LAST])
    @pytest.mark.parametrize("there_and_back", [False, True])
    def test_files_of_two_layouts_are_not_loaded(
        self, kept: Path, monkeypatch: pytest.MonkeyPatch, moment: str, there_and_back: bool
    ) -> None:
        opened = InstalledModel._open

        def beside(model: InstalledModel, name: str, expected: Any) -> Any:
            file = opened(model, name, expected)
            if name == moment:
                monkeypatch.undo()
                pack(kept)
                if there_and_back:
                    convert(kept, "bitsandbytes", NoProgress())
            return file

        monkeypatch.setattr(InstalledModel, "_open", beside)
        with pytest.raises(CheckpointError, match="changed while it was being loaded"):
            InstalledModel(kept)
        with InstalledModel(kept):
            pass

    def test_files_of_a_conversion_that_is_under_way_are_not_loaded(
        self, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = InstalledModel._open

        def beside(model: InstalledModel, name: str, expected: Any) -> Any:
            if name == LAST:
                (kept / CONVERSION_DIR).mkdir(exist_ok=True)
            return opened(model, name, expected)

        monkeypatch.setattr(InstalledModel, "_open", beside)
        with pytest.raises(CheckpointError, match="changed while it was being loaded"):
            InstalledModel(kept)

    def test_a_file_that_was_replaced_since_is_not_opened_past_the_page_cache(
        self, kept: Path
    ) -> None:
        with InstalledModel(kept) as model:
            stride = model.blueprint.expert.stride
            before, after = (torch.empty(stride, dtype=torch.uint8) for _ in range(2))
            model.read_expert(0, 1, before)
            pack(kept)
            assert not model.open_direct()
            model.read_expert(0, 1, after)
            assert torch.equal(before, after)


class TestConverting:
    @pytest.mark.parametrize(("old", "new"), [LAYOUTS, LAYOUTS[::-1]])
    @pytest.mark.parametrize("options", [{}, ALL_4BIT])
    def test_it_gives_what_quantizing_straight_into_that_layout_gives(
        self,
        tiny_checkpoint: Path,
        keep: Callable[..., Path],
        old: Layout,
        new: Layout,
        options: dict[str, Any],
    ) -> None:
        kept, straight = (keep(tiny_checkpoint, layout=layout, **options) for layout in (old, new))
        before = files_of(kept)
        assert convert(kept, new, NoProgress())
        assert files_of(kept) == files_of(straight)
        assert files_of(kept)[FIRST] != before[FIRST]
        assert verify(kept) == []

    def test_there_and_back_gives_the_same_bytes(self, kept: Path) -> None:
        before = files_of(kept)
        assert pack(kept)
        assert convert(kept, "bitsandbytes", NoProgress())
        assert files_of(kept) == before

    @pytest.mark.parametrize("options", [{"quant_type": "fp4"}, {"head": True}])
    def test_every_matrix_of_a_model_whose_head_is_its_embedding(
        self,
        make_checkpoint: Callable[..., Path],
        keep: Callable[..., Path],
        options: dict[str, Any],
    ) -> None:
        checkpoint = make_checkpoint(
            vocab_size=128, intermediate_size=128, tie_word_embeddings=True
        )
        kept, straight = (keep(checkpoint, layout=layout, **options) for layout in LAYOUTS)
        assert pack(kept)
        assert files_of(kept) == files_of(straight)

    def test_it_answers_as_before(self, kept: Path) -> None:
        before = text_of(kept)
        pack(kept)
        assert text_of(kept) == before

    def test_a_file_in_which_nothing_changes_is_not_written(
        self, tiny_checkpoint: Path, keep: Callable[..., Path]
    ) -> None:
        kept = keep(tiny_checkpoint, layout="bitsandbytes")  # the attention is dense
        before = {path.name: path.stat().st_ino for path in kept.iterdir()}
        pack(kept)
        changed = {path.name for path in kept.iterdir() if path.stat().st_ino != before[path.name]}
        assert changed == {FIRST, LAST, "mixchat.json", "mixchat.copy.json"}

    def test_the_bar_counts_every_byte_that_is_rewritten(self, kept: Path) -> None:
        meter = Meter()
        pack(kept, meter)
        bar = meter.bar("converting mine")
        assert 0 < bar.done == bar.total
        assert bar.closed

    def test_no_more_than_one_file_is_there_twice(
        self, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[list[str]] = []
        move = _Conversion._move

        def watched(self: _Conversion, name: str) -> None:
            seen.append(sorted(os.listdir(kept / CONVERSION_DIR)))
            move(self, name)

        monkeypatch.setattr(_Conversion, "_move", watched)
        pack(kept)
        names = ("shared.safetensors", FIRST, LAST)
        assert seen == [sorted([name, "journal.jsonl"]) for name in names]


class TestNothingToDo:
    def test_a_model_that_has_the_layout_is_left_alone(self, kept: Path) -> None:
        before = files_of(kept)
        assert not convert(kept, "bitsandbytes", NoProgress())
        assert files_of(kept) == before

    def test_one_without_4_bits_is_refused(
        self, tiny_checkpoint: Path, keep: Callable[..., Path]
    ) -> None:
        dense = keep(tiny_checkpoint, quant_type="none", layout="bitsandbytes")
        before = files_of(dense)
        with pytest.raises(UsageError, match="in 4 bits"):
            pack(dense)
        assert files_of(dense) == before

    @pytest.mark.parametrize("best", LAYOUTS)
    def test_without_a_wish_it_takes_what_this_machine_computes_fastest(
        self, kept: Path, monkeypatch: pytest.MonkeyPatch, best: Layout
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(quantize_module.four_bit, "available", lambda: best == "cpu-packed")
        assert layout_to_take(kept, None) == best
        assert layout_to_take(kept, "bitsandbytes") == "bitsandbytes"


class Killed(BaseException):
    """The process is gone: nothing that it would do on its way out happens."""


class Killer:
    """Kills at the step numbered `at` of those that change what is on the disk for good."""

    def __init__(self, at: int) -> None:
        self._at, self.steps = at, 0
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Killer:
        for place, name in [(os, "fsync"), (os, "replace"), (Path, "unlink"), (shutil, "rmtree")]:
            self.patch.setattr(place, name, self._counted(getattr(place, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()

    def _counted(self, act: Callable[..., None]) -> Callable[..., None]:
        def counted(*arguments: Any, **options: Any) -> None:
            if self.steps == self._at:
                raise Killed
            self.steps += 1
            act(*arguments, **options)

        return counted


def kill_at(directory: Path, step: int) -> bool:
    """Convert until that step; whether it came to that."""
    with Killer(step):
        try:
            pack(directory)
        except Killed:
            return True
    return False


class TestCutOff:
    def test_killed_at_any_step_it_loads_or_says_what_to_do_and_goes_on(
        self, both: dict[str, Path], tmp_path: Path
    ) -> None:
        expected, step, refused = files_of(both["cpu-packed"]), 0, 0
        killed = True
        while killed:
            kept = Path(shutil.copytree(both["bitsandbytes"], tmp_path / str(step) / "mine"))
            if killed := kill_at(kept, step):
                refused += self.check_half_converted(kept)
                wanted = layout_to_take(kept, None if refused_now(kept) else "cpu-packed")
                assert wanted == "cpu-packed"
                pack(kept)
                self.sweep(kept)
            assert files_of(kept) == expected
            shutil.rmtree(kept)
            step += 1
        assert step > 25
        assert refused > 15

    def check_half_converted(self, kept: Path) -> bool:
        """Every file is whole and known; the model loads, or names the command to run."""
        assert verify(kept) == []
        if not refused_now(kept):
            InstalledModel(kept).close()
            return False
        with pytest.raises(CheckpointError, match="the conversion to another layout") as caught:
            InstalledModel(kept)
        assert caught.value.hint == "To finish it: mixchat convert mine"
        return True

    def sweep(self, kept: Path) -> None:
        """What `gc` removes of a finished model."""
        for leftover in housekeeping._left_in(kept):
            assert not leftover.resumable
            housekeeping._cleared(leftover, unfinished=False)

    def test_twice_in_a_row_it_still_goes_on(self, both: dict[str, Path], kept: Path) -> None:
        for step in (20, 8, 8):
            assert kill_at(kept, step)
        pack(kept)
        assert files_of(kept) == files_of(both["cpu-packed"])

    @pytest.mark.parametrize("name", ["shared.safetensors", FIRST, LAST])
    def test_stopped_at_a_file_it_goes_on_there(
        self,
        both: dict[str, Path],
        kept: Path,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
    ) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, name, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                pack(kept)
        untouched = name == "shared.safetensors"
        assert refused_now(kept) != untouched
        assert not list(kept.rglob("*.tmp"))
        meter = Meter()
        pack(kept, meter)
        bar = meter.bar("converting")
        assert (bar.first == 0) == untouched
        assert bar.done == bar.total
        assert files_of(kept) == files_of(both["cpu-packed"])

    def test_stopped_before_the_first_file_is_done_it_is_as_before(
        self, both: dict[str, Path], kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, "shared.safetensors", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(kept)
        assert files_of(kept) == files_of(both["bitsandbytes"])

    def test_a_full_disk_leaves_what_can_be_gone_on_with(
        self, both: dict[str, Path], kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, LAST, OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(OSError, match="No space"):
                pack(kept)
        assert verify(kept) == []
        pack(kept)
        assert files_of(kept) == files_of(both["cpu-packed"])

    def test_the_other_layout_has_to_wait(
        self, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, LAST, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(kept)
        monkeypatch.setattr("mixchat.weights.care.convert.best_layout", lambda: "bitsandbytes")
        assert layout_to_take(kept, None) == "cpu-packed"
        with pytest.raises(UsageError, match="to the layout cpu-packed was cut off") as caught:
            layout_to_take(kept, "bitsandbytes")
        assert caught.value.hint == "Finish it first: mixchat convert mine"

    def test_it_is_listed_as_half_converted_and_gc_leaves_it_alone(
        self, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, LAST, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(kept)
        assert models.entry_of(kept).problem == "half converted"
        assert list(housekeeping._left_in(kept)) == []

    def test_a_journal_that_cannot_be_read_is_refused(
        self, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, LAST, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(kept)
        (kept / CONVERSION_DIR / "journal.jsonl").write_bytes(b"junk\n")
        for act in (lambda: layout_to_take(kept, None), lambda: verify(kept)):
            with pytest.raises(CheckpointError, match="record of a conversion is damaged"):
                act()


class TestDamage:
    def test_it_is_named_before_anything_is_changed(
        self, both: dict[str, Path], kept: Path
    ) -> None:
        flip(kept / "shared.safetensors", -1)
        before = files_of(kept)
        with pytest.raises(CheckpointError, match=r"lm_head\.codes is damaged") as caught:
            pack(kept)
        assert "mixchat repair" in (caught.value.hint or "")
        assert files_of(kept) == before

    def test_in_the_middle_it_is_mended_in_the_layout_of_its_file(
        self, both: dict[str, Path], kept: Path, tiny_checkpoint: Path
    ) -> None:
        flip(kept / LAST, -5000)
        with pytest.raises(CheckpointError, match=f"{LAST}: 3\\.w"):
            pack(kept)
        flip(kept / FIRST, 5000)  # which is converted already
        damaged = verify(kept)
        assert [damage.file for damage in damaged] == [FIRST, LAST]
        mend(kept, tiny_checkpoint)
        assert verify(kept) == []
        assert pack(kept)
        assert files_of(kept) == files_of(both["cpu-packed"])

    def test_a_file_that_is_missing_or_cut_short_is_named(self, kept: Path) -> None:
        os.truncate(kept / FIRST, 5000)
        with pytest.raises(CheckpointError, match=f"{FIRST}: 5000 bytes"):
            pack(kept)
        (kept / FIRST).unlink()
        with pytest.raises(CheckpointError, match=f"{FIRST}: the file is missing"):
            pack(kept)

    def test_a_header_that_names_others_is_refused(self, kept: Path) -> None:
        data = (kept / "shared.safetensors").read_bytes()
        (kept / "shared.safetensors").write_bytes(data.replace(b"model.norm.", b"model.harm."))
        with pytest.raises(CheckpointError, match="not those of this model"):
            pack(kept)

    def test_a_manifest_of_another_model_is_refused(self, kept: Path) -> None:
        config = (kept / "config.json").read_text()
        (kept / "config.json").write_text(config.replace('hidden_layers": 2', 'hidden_layers": 3'))
        with pytest.raises(CheckpointError):
            pack(kept)


class TestDisk:
    def test_without_room_for_the_largest_file_it_does_not_begin(
        self, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = files_of(kept)
        monkeypatch.setattr(machine, "free_disk", lambda directory: 4_000_000)
        with pytest.raises(ResourceError, match=r"not enough disk in .*mine: 4"):
            pack(kept)
        assert files_of(kept) == before

    def test_room_for_one_file_is_enough(self, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        largest = max(record.size for record in read_manifest(kept).weights.values())
        monkeypatch.setattr(machine, "free_disk", lambda directory: 4_000_000 + largest)
        assert pack(kept)


def refused_now(directory: Path) -> bool:
    """Whether the model cannot be loaded, being half converted."""
    return (directory / CONVERSION_DIR).exists()


def stop_at(patch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Raise this in the middle of writing a file."""
    write = SafetensorsWriter.write

    def stopping(self: SafetensorsWriter, tensor: str, *rest: Any) -> None:
        if self.path.name == name and len(self._todo) == 1:
            raise error
        write(self, tensor, *rest)

    patch.setattr(SafetensorsWriter, "write", stopping)
