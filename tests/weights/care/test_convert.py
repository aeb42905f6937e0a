"""An installed model's codes change their layout without loss, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import json
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
from mixchat.options import DenseBits, LoadOptions, SamplingOptions
from mixchat.safetensors import SafetensorsWriter
from mixchat.weights import models
from mixchat.weights.care import housekeeping
from mixchat.weights.care.convert import _Converter, convert, find_target
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import CONVERSION_DIR, read_manifest
from mixchat.weights.make import quantize_options as quantize_module
from mixchat.weights.matrix.linear import Layout

LAYOUTS: tuple[Layout, Layout] = ("bitsandbytes", "cpu-packed")
FIRST, LAST = "experts-000.safetensors", "experts-001.safetensors"
ALL_4BIT = {"attention": 4, "head": 4}
AS_STORED, EIGHT = DenseBits(), DenseBits(8, 8)


@pytest.fixture(scope="module")
def both(tiny_checkpoint: Path, install: Callable[..., Path]) -> dict[str, Path]:
    """The same model quantized straight into either layout. Do not write into it."""
    return {layout: install(tiny_checkpoint, layout=layout, **ALL_4BIT) for layout in LAYOUTS}


@pytest.fixture
def installed(both: dict[str, Path], tmp_path: Path) -> Path:
    """A copy in the layout "bitsandbytes" that a test may change."""
    return Path(shutil.copytree(both["bitsandbytes"], tmp_path / "models" / "mine"))


def reform(
    directory: Path,
    layout: Layout | None = None,
    bits: DenseBits = AS_STORED,
    meter: Meter | None = None,
) -> bool:
    return convert(directory, find_target(directory, layout, bits), meter or Meter())


def pack(directory: Path, meter: Meter | None = None) -> bool:
    return reform(directory, "cpu-packed", meter=meter)


def layout_of_target(directory: Path, asked: Layout | None) -> Layout:
    return find_target(directory, asked, AS_STORED).layout


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
                    reform(installed, "bitsandbytes")
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
    @pytest.mark.parametrize("options", [{}, ALL_4BIT, {"attention": 16, "head": 16}])
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
        assert reform(installed, new)
        assert files_of(installed) == files_of(straight)
        assert files_of(installed)[FIRST] != before[FIRST]
        assert verify(installed) == []

    def test_there_and_back_gives_the_same_bytes(self, installed: Path) -> None:
        before = files_of(installed)
        assert pack(installed)
        assert reform(installed, "bitsandbytes")
        assert files_of(installed) == before

    @pytest.mark.parametrize(
        "options", [{"quant_type": "fp4"}, {"head": 4}, {"attention": 16, "head": 16}]
    )
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
        dense = {"attention": 16, "head": 16}
        installed = install(tiny_checkpoint, layout="bitsandbytes", **dense)
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
        assert not reform(installed, "bitsandbytes")
        assert files_of(installed) == before

    def test_one_without_4_bits_is_refused(
        self, tiny_checkpoint: Path, install: Callable[..., Path]
    ) -> None:
        dense = install(tiny_checkpoint, quant_type="none", layout="bitsandbytes")
        before = files_of(dense)
        with pytest.raises(UsageError, match="in 3 or 4 bits"):
            pack(dense)
        assert files_of(dense) == before

    @pytest.mark.parametrize("best", LAYOUTS)
    def test_without_a_layout_it_takes_the_one_that_this_machine_computes_fastest(
        self, installed: Path, monkeypatch: pytest.MonkeyPatch, best: Layout
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(quantize_module.coded, "available", lambda: best == "cpu-packed")
        assert layout_of_target(installed, None) == best
        assert layout_of_target(installed, "bitsandbytes") == "bitsandbytes"


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


DENSE: dict[str, Any] = {"attention": 16, "head": 16}
# The options of the model before and after, what is requested, and the least steps it takes.
CONVERSIONS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[Layout | None, DenseBits], int]]
CONVERSIONS = {
    "layout": (ALL_4BIT, {"layout": "cpu-packed", **ALL_4BIT}, ("cpu-packed", AS_STORED), 25),
    "bits": (DENSE, {"layout": "bitsandbytes"}, (None, EIGHT), 12),
    "layout and bits": (DENSE, {"layout": "cpu-packed"}, ("cpu-packed", EIGHT), 25),
}


def kill_at(
    directory: Path,
    step: int,
    layout: Layout | None = "cpu-packed",
    bits: DenseBits = AS_STORED,
) -> bool:
    """Convert until that step; return whether it was reached."""
    with Killer(step):
        try:
            reform(directory, layout, bits)
        except Killed:
            return True
    return False


class TestCutOff:
    @pytest.mark.parametrize("name", CONVERSIONS)
    def test_killed_at_any_step_it_loads_or_says_what_to_do_and_resumes(
        self, name: str, tiny_checkpoint: Path, install: Callable[..., Path], tmp_path: Path
    ) -> None:
        before, after, requested, least = CONVERSIONS[name]
        original = install(tiny_checkpoint, **{"layout": "bitsandbytes", **before})
        expected, step, refused = files_of(install(tiny_checkpoint, **after)), 0, 0
        killed = True
        while killed:
            installed = Path(shutil.copytree(original, tmp_path / str(step) / "mine"))
            if killed := kill_at(installed, step, *requested):
                half = self.check_half_converted(installed)
                refused += half
                reform(installed, *((None, AS_STORED) if half else requested))
                self.sweep(installed)
            assert files_of(installed) == expected
            shutil.rmtree(installed)
            step += 1
        assert step > least
        assert refused > least // 2

    def check_half_converted(self, installed: Path) -> bool:
        """Check that every file is intact; that the model loads, or names the command to run."""
        assert verify(installed) == []
        if not refused_now(installed):
            InstalledModel(installed).close()
            return False
        with pytest.raises(
            CheckpointError, match="a conversion is running or was interrupted"
        ) as caught:
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
        assert layout_of_target(installed, None) == "cpu-packed"
        with pytest.raises(UsageError, match="was interrupted: to layout cpu-packed") as caught:
            layout_of_target(installed, "bitsandbytes")
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
        for act in (lambda: layout_of_target(installed, None), lambda: verify(installed)):
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


@pytest.fixture
def dense(tiny_checkpoint: Path, install: Callable[..., Path], tmp_path: Path) -> Path:
    """A model with attention and head in 16 bits that a test may change."""
    made = install(tiny_checkpoint, layout="bitsandbytes", **DENSE)
    return Path(shutil.copytree(made, tmp_path / "models" / "mine"))


class TestRounding:
    """Attention and head of an installed model get 8 bits, as if it had been downloaded so."""

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(
        ("bits", "options"),
        [
            (EIGHT, {}),
            (DenseBits(attention=8), {"head": 16}),
            (DenseBits(head=8), {"attention": 16}),
            (DenseBits(8, 16), {"head": 16}),
        ],
    )
    @pytest.mark.parametrize("stored_as", ["float32", "bfloat16"])
    def test_it_gives_what_a_download_gives(
        self,
        make_checkpoint: Callable[..., Path],
        install: Callable[..., Path],
        tied: bool,
        bits: DenseBits,
        options: dict[str, Any],
        stored_as: str,
    ) -> None:
        checkpoint = make_checkpoint(stored_as=stored_as, tie_word_embeddings=tied)
        installed = install(checkpoint, layout="bitsandbytes", **DENSE)
        assert reform(installed, None, bits)
        assert files_of(installed) == files_of(
            install(checkpoint, layout="bitsandbytes", **options)
        )
        assert verify(installed) == []
        assert not reform(installed, None, bits)

    def test_only_the_file_that_changes_is_written_and_is_there_twice(
        self, dense: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = {path.name: path.stat().st_ino for path in dense.iterdir()}
        size = read_manifest(dense).weights["shared.safetensors"].size
        monkeypatch.setattr(machine, "free_disk", lambda directory: 4_000_000 + size)
        meter = Meter()
        assert reform(dense, None, EIGHT, meter)
        changed = {path.name for path in dense.iterdir() if path.stat().st_ino != before[path.name]}
        assert changed == {"shared.safetensors", "mixchat.json", "mixchat.copy.json"}
        bar = meter.bar("converting mine")
        assert 0 < bar.done == bar.total
        assert read_manifest(dense).weights["shared.safetensors"].size < size

    def test_without_room_it_does_not_begin(
        self, dense: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = files_of(dense)
        monkeypatch.setattr(machine, "free_disk", lambda directory: 4_000_000)
        with pytest.raises(ResourceError, match="not enough disk"):
            reform(dense, None, EIGHT)
        assert files_of(dense) == before

    @pytest.mark.parametrize(
        ("options", "bits", "said"),
        [
            ({}, DenseBits(16, 16), "the attention of 'mine' has 8 bits"),
            ({}, DenseBits(head=4), "the head of 'mine' has 8 bits"),
            (ALL_4BIT, EIGHT, "the attention of 'mine' has 4 bits"),
            (ALL_4BIT, DenseBits(head=16), "the head of 'mine' has 4 bits"),
            (DENSE, DenseBits(4, 4), "the attention of 'mine' has 16 bits"),
            ({"attention": 16}, EIGHT, None),
            ({"attention": 4}, DenseBits(4, 8), None),
        ],
    )
    def test_only_16_bits_can_become_8(
        self,
        tiny_checkpoint: Path,
        install: Callable[..., Path],
        tmp_path: Path,
        options: dict[str, Any],
        bits: DenseBits,
        said: str | None,
    ) -> None:
        made = install(tiny_checkpoint, layout="bitsandbytes", **options)
        installed = Path(shutil.copytree(made, tmp_path / "mine"))
        before = files_of(installed)
        if said is None:
            reform(installed, None, bits)
            return
        with pytest.raises(UsageError, match=said):
            reform(installed, None, bits)
        assert files_of(installed) == before

    def test_other_bits_have_to_wait_for_an_unfinished_conversion(
        self, dense: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, LAST, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                reform(dense, "cpu-packed", DenseBits(attention=8))
        for layout, bits in ((None, EIGHT), ("bitsandbytes", AS_STORED), (None, DenseBits(16))):
            with pytest.raises(UsageError, match="attention int8, head none"):
                find_target(dense, layout, bits)  # type: ignore[arg-type]
        assert reform(dense, None, DenseBits(8, 16))
        assert verify(dense) == []

    @pytest.mark.parametrize("file", ["shared.safetensors", LAST])
    def test_in_the_middle_it_is_repaired_in_the_form_of_its_file(
        self,
        dense: Path,
        tiny_checkpoint: Path,
        install: Callable[..., Path],
        monkeypatch: pytest.MonkeyPatch,
        file: str,
    ) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, LAST, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                reform(dense, "cpu-packed", EIGHT)
        assert verify(dense) == []
        flip(dense / file, -5000)
        assert [damage.file for damage in verify(dense)] == [file]
        mend(dense, tiny_checkpoint)
        assert verify(dense) == []
        assert reform(dense)
        assert files_of(dense) == files_of(install(tiny_checkpoint, layout="cpu-packed"))

    def test_a_finished_one_is_repaired_from_its_checkpoint(
        self, dense: Path, tiny_checkpoint: Path
    ) -> None:
        """The checkpoint is in fp32, the model that was rounded had 16 bits."""
        reform(dense, None, EIGHT)
        converted = files_of(dense)
        (dense / "shared.safetensors").unlink()
        mend(dense, tiny_checkpoint)
        assert files_of(dense) == converted


def as_format_2(directory: Path) -> None:
    """Rewrite the manifests as versions before format 3 wrote them."""
    for name in ("mixchat.json", "mixchat.copy.json"):
        document = json.loads((directory / name).read_text())
        how = document["quantization"]
        words = {part: how[part] != "none" for part in ("attention", "head")}
        document |= {"format": 2, "quantization": how | words}
        document.pop("sha256")
        canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
        document["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
        (directory / name).write_text(json.dumps(document, indent=1) + "\n")


class TestOldFormat:
    """A model of format 2 is verified, repaired and converted; it keeps its format if it can."""

    @pytest.fixture(params=[DENSE, ALL_4BIT], ids=["16 bits", "4 bits"])
    def old(
        self,
        request: pytest.FixtureRequest,
        tiny_checkpoint: Path,
        install: Callable[..., Path],
        tmp_path: Path,
    ) -> Path:
        made = install(tiny_checkpoint, layout="bitsandbytes", **request.param)
        installed = Path(shutil.copytree(made, tmp_path / "models" / "mine"))
        as_format_2(installed)
        return installed

    def test_it_is_intact_and_answers(self, old: Path) -> None:
        assert verify(old) == []
        assert len(text_of(old)) == 20

    def test_it_is_repaired(self, old: Path, tiny_checkpoint: Path) -> None:
        before = files_of(old)
        flip(old / "mixchat.json", 100)
        flip(old / "shared.safetensors", -1)
        mend(old, tiny_checkpoint)
        assert files_of(old) == before

    def test_with_another_layout_it_keeps_its_format(self, old: Path) -> None:
        before = files_of(old)
        assert pack(old)
        assert json.loads((old / "mixchat.json").read_text())["format"] == 2
        assert verify(old) == []
        assert reform(old, "bitsandbytes")
        assert files_of(old) == before

    def test_a_conversion_that_an_earlier_version_began_is_finished(
        self, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            stop_at(patch, LAST, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                pack(old)
        journal = old / CONVERSION_DIR / "journal.jsonl"
        _, *lines = journal.read_text().splitlines(keepends=True)
        head = json.dumps({"format": 2, "layout": "cpu-packed"}) + "\n"
        journal.write_text("".join([head, *lines]))
        assert verify(old) == []
        meter = Meter()
        assert reform(old, meter=meter)
        assert meter.bar("converting").first > 0
        assert verify(old) == []
        assert read_manifest(old).quantization["layout"] == "cpu-packed"
        assert json.loads((old / "mixchat.json").read_text())["format"] == 2


def test_a_model_of_the_old_format_gets_the_new_one_with_8_bits(
    dense: Path, tiny_checkpoint: Path, install: Callable[..., Path]
) -> None:
    as_format_2(dense)
    assert reform(dense, None, EIGHT)
    assert files_of(dense) == files_of(install(tiny_checkpoint, layout="bitsandbytes"))
