"""An installed model's codes change their layout without loss, whatever happens on the way."""

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
from mixchat.errors import CheckpointError, ResourceError, UsageError
from mixchat.loading.loader import load_engine
from mixchat.options import LoadOptions, SamplingOptions
from mixchat.progress import NoProgress
from mixchat.safetensors import SafetensorsWriter
from mixchat.weights import models
from mixchat.weights.care import housekeeping
from mixchat.weights.care.convert import _Converter, convert, target_layout
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import CONVERSION_DIR, read_manifest
from mixchat.weights.make import quantize_options as quantize_module
from mixchat.weights.matrix.linear import Layout

LAYOUTS: tuple[Layout, Layout] = ("bitsandbytes", "cpu-packed")
FIRST, LAST = "experts-000.safetensors", "experts-001.safetensors"
ALL_4BIT = {"attention": True, "head": True}


@pytest.fixture(scope="module")
def both(tiny_checkpoint: Path, install: Callable[..., Path]) -> dict[str, Path]:
    """The same model quantized straight into either layout. Do not write into it."""
    return {layout: install(tiny_checkpoint, layout=layout, **ALL_4BIT) for layout in LAYOUTS}


@pytest.fixture
def installed(both: dict[str, Path], tmp_path: Path) -> Path:
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
        self, installed: Path, monkeypatch: pytest.MonkeyPatch, moment: str, there_and_back: bool
    ) -> None:
        opened = InstalledModel._open

        def beside(model: InstalledModel, name: str, expected: Any) -> Any:
            file = opened(model, name, expected)
            if name == moment:
                monkeypatch.undo()
                pack(installed)
                if there_and_back:
                    convert(installed, "bitsandbytes", NoProgress())
            return file

        monkeypatch.setattr(InstalledModel, "_open", beside)
        with pytest.raises(CheckpointError, match="changed while it was being loaded"):
            InstalledModel(installed)
        with InstalledModel(installed):
            pass

    def test_files_of_a_conversion_that_is_under_way_are_not_loaded(
        self, installed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = InstalledModel._open

        def beside(model: InstalledModel, name: str, expected: Any) -> Any:
            if name == LAST:
                (installed / CONVERSION_DIR).mkdir(exist_ok=True)
            return opened(model, name, expected)

        monkeypatch.setattr(InstalledModel, "_open", beside)
        with pytest.raises(CheckpointError, match="changed while it was being loaded"):
            InstalledModel(installed)

    def test_a_file_that_was_replaced_since_is_not_opened_past_the_page_cache(
        self, installed: Path
    ) -> None:
        with InstalledModel(installed) as model:
            stride = model.blueprint.expert.stride
            before, after = (torch.empty(stride, dtype=torch.uint8) for _ in range(2))
            model.read_expert(0, 1, before)
            pack(installed)
            assert not model.open_direct()
            model.read_expert(0, 1, after)
            assert torch.equal(before, after)


class TestConverting:
    @pytest.mark.parametrize(("old", "new"), [LAYOUTS, LAYOUTS[::-1]])
    @pytest.mark.parametrize("options", [{}, ALL_4BIT])
    def test_it_gives_what_quantizing_straight_into_that_layout_gives(
        self,
        tiny_checkpoint: Path,
        install: Callable[..., Path],
        old: Layout,
        new: Layout,
        options: dict[str, Any],
    ) -> None:
        installed, straight = (
            install(tiny_checkpoint, layout=layout, **options) for layout in (old, new)
        )
        before = files_of(installed)
        assert convert(installed, new, NoProgress())
        assert files_of(installed) == files_of(straight)
        assert files_of(installed)[FIRST] != before[FIRST]
        assert verify(installed) == []

    def test_there_and_back_gives_the_same_bytes(self, installed: Path) -> None:
        before = files_of(installed)
        assert pack(installed)
        assert convert(installed, "bitsandbytes", NoProgress())
        assert files_of(installed) == before

    @pytest.mark.parametrize("options", [{"quant_type": "fp4"}, {"head": True}])
    def test_every_matrix_of_a_model_whose_head_is_its_embedding(
        self,
        make_checkpoint: Callable[..., Path],
        install: Callable[..., Path],
        options: dict[str, Any],
    ) -> None:
        checkpoint = make_checkpoint(
            vocab_size=128, intermediate_size=128, tie_word_embeddings=True
        )
        installed, straight = (install(checkpoint, layout=layout, **options) for layout in LAYOUTS)
        assert pack(installed)
        assert files_of(installed) == files_of(straight)

    def test_it_answers_as_before(self, installed: Path) -> None:
        before = text_of(installed)
        pack(installed)
        assert text_of(installed) == before

    def test_a_file_in_which_nothing_changes_is_not_written(
        self, tiny_checkpoint: Path, install: Callable[..., Path]
    ) -> None:
        installed = install(tiny_checkpoint, layout="bitsandbytes")  # the attention is dense
        before = {path.name: path.stat().st_ino for path in installed.iterdir()}
        pack(installed)
        changed = {
            path.name for path in installed.iterdir() if path.stat().st_ino != before[path.name]
        }
        assert changed == {FIRST, LAST, "mixchat.json", "mixchat.copy.json"}

    def test_the_bar_counts_every_byte_that_is_rewritten(self, installed: Path) -> None:
        meter = Meter()
        pack(installed, meter)
        bar = meter.bar("converting mine")
        assert 0 < bar.done == bar.total
        assert bar.closed

    def test_no_more_than_one_file_is_there_twice(
        self, installed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[list[str]] = []
        move = _Converter._move

        def watched(self: _Converter, name: str) -> None:
            seen.append(sorted(os.listdir(installed / CONVERSION_DIR)))
            move(self, name)

        monkeypatch.setattr(_Converter, "_move", watched)
        pack(installed)
        names = ("shared.safetensors", FIRST, LAST)
        assert seen == [sorted([name, "journal.jsonl"]) for name in names]


class TestNothingToDo:
    def test_a_model_that_has_the_layout_is_left_alone(self, installed: Path) -> None:
        before = files_of(installed)
        assert not convert(installed, "bitsandbytes", NoProgress())
        assert files_of(installed) == before

    def test_one_without_4_bits_is_refused(
        self, tiny_checkpoint: Path, install: Callable[..., Path]
    ) -> None:
        dense = install(tiny_checkpoint, quant_type="none", layout="bitsandbytes")
        before = files_of(dense)
        with pytest.raises(UsageError, match="in 4 bits"):
            pack(dense)
        assert files_of(dense) == before

    @pytest.mark.parametrize("best", LAYOUTS)
    def test_without_a_layout_it_takes_the_one_that_this_machine_computes_fastest(
        self, installed: Path, monkeypatch: pytest.MonkeyPatch, best: Layout
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(quantize_module.coded, "available", lambda: best == "cpu-packed")
        assert target_layout(installed, None) == best
        assert target_layout(installed, "bitsandbytes") == "bitsandbytes"


class Killed(BaseException):
    """The process is gone: nothing that it would do on its way out happens."""


class Killer:
    """Kills at the step numbered `at` of those that change the disk for good."""

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
    """Convert until that step; return whether it was reached."""
    with Killer(step):
        try:
            pack(directory)
        except Killed:
            return True
    return False


class TestCutOff:
    def test_killed_at_any_step_it_loads_or_says_what_to_do_and_resumes(
        self, both: dict[str, Path], tmp_path: Path
    ) -> None:
        expected, step, refused = files_of(both["cpu-packed"]), 0, 0
        killed = True
        while killed:
            installed = Path(shutil.copytree(both["bitsandbytes"], tmp_path / str(step) / "mine"))
            if killed := kill_at(installed, step):
                refused += self.check_half_converted(installed)
                wanted = target_layout(installed, None if refused_now(installed) else "cpu-packed")
                assert wanted == "cpu-packed"
                pack(installed)
                self.sweep(installed)
            assert files_of(installed) == expected
            shutil.rmtree(installed)
            step += 1
        assert step > 25
        assert refused > 15

    def check_half_converted(self, installed: Path) -> bool:
        """Check that every file is intact; that the model loads, or names the command to run."""
        assert verify(installed) == []
        if not refused_now(installed):
            InstalledModel(installed).close()
            return False
        with pytest.raises(CheckpointError, match="the conversion to another layout") as caught:
            InstalledModel(installed)
        assert caught.value.hint == "To finish it: mixchat convert mine"
        return True

    def sweep(self, installed: Path) -> None:
        """Remove what `gc` removes of a finished model."""
        for leftover in housekeeping._left_in(installed):
            assert not leftover.resumable
            housekeeping._cleared(leftover, unfinished=False)

    def test_twice_in_a_row_it_still_resumes(self, both: dict[str, Path], installed: Path) -> None:
        for step in (20, 8, 8):
            assert kill_at(installed, step)
        pack(installed)
        assert files_of(installed) == files_of(both["cpu-packed"])

    @pytest.mark.parametrize("name", ["shared.safetensors", FIRST, LAST])
    def test_stopped_at_a_file_it_resumes_there(
        self,
        both: dict[str, Path],
        installed: Path,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
    ) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, name, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                pack(installed)
        untouched = name == "shared.safetensors"
        assert refused_now(installed) != untouched
        assert not list(installed.rglob("*.tmp"))
        meter = Meter()
        pack(installed, meter)
        bar = meter.bar("converting")
        assert (bar.first == 0) == untouched
        assert bar.done == bar.total
        assert files_of(installed) == files_of(both["cpu-packed"])

    def test_stopped_before_the_first_file_is_done_it_is_as_before(
        self, both: dict[str, Path], installed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, "shared.safetensors", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(installed)
        assert files_of(installed) == files_of(both["bitsandbytes"])

    def test_a_full_disk_leaves_what_can_be_resumed(
        self, both: dict[str, Path], installed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, LAST, OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(OSError, match="No space"):
                pack(installed)
        assert verify(installed) == []
        pack(installed)
        assert files_of(installed) == files_of(both["cpu-packed"])

    def test_the_other_layout_has_to_wait(
        self, installed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, LAST, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(installed)
        monkeypatch.setattr("mixchat.weights.care.convert.best_layout", lambda: "bitsandbytes")
        assert target_layout(installed, None) == "cpu-packed"
        with pytest.raises(UsageError, match="to the layout cpu-packed was interrupted") as caught:
            target_layout(installed, "bitsandbytes")
        assert caught.value.hint == "Finish it first: mixchat convert mine"

    def test_it_is_listed_as_half_converted_and_gc_leaves_it_alone(
        self, installed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, LAST, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(installed)
        assert models.describe(installed).problem == "half converted"
        assert list(housekeeping._left_in(installed)) == []

    def test_a_journal_that_cannot_be_read_is_refused(
        self, installed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, LAST, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(installed)
        (installed / CONVERSION_DIR / "journal.jsonl").write_bytes(b"junk\n")
        for act in (lambda: target_layout(installed, None), lambda: verify(installed)):
            with pytest.raises(CheckpointError, match="record of a conversion is damaged"):
                act()


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


class TestDisk:
    def test_without_room_for_the_largest_file_it_does_not_begin(
        self, installed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = files_of(installed)
        monkeypatch.setattr(machine, "free_disk", lambda directory: 4_000_000)
        with pytest.raises(ResourceError, match=r"not enough disk in .*mine: 4"):
            pack(installed)
        assert files_of(installed) == before

    def test_room_for_one_file_is_enough(
        self, installed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        largest = max(record.size for record in read_manifest(installed).weights.values())
        monkeypatch.setattr(machine, "free_disk", lambda directory: 4_000_000 + largest)
        assert pack(installed)


def refused_now(directory: Path) -> bool:
    """Return whether the model cannot be loaded, being half converted."""
    return (directory / CONVERSION_DIR).exists()


def stop_at(patch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Raise this in the middle of writing a file."""
    write = SafetensorsWriter.write

    def stopping(self: SafetensorsWriter, tensor: str, *rest: Any) -> None:
        if self.path.name == name and len(self._todo) == 1:
            raise error
        write(self, tensor, *rest)

    patch.setattr(SafetensorsWriter, "write", stopping)
