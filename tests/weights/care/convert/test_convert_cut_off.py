"""A conversion that is cut off anywhere leaves a model that loads, or says what finishes it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from care_tools import verify
from convert_tools import (
    ALL_4BIT,
    AS_STORED,
    DENSE,
    EIGHT,
    FIRST,
    LAST,
    is_half_converted,
    layout_of_target,
    pack,
    reform,
    stop_at,
)
from weight_tools import Meter, files_of

from mixchat.errors import CheckpointError, UsageError
from mixchat.options import DenseBits
from mixchat.weights import models
from mixchat.weights.care import housekeeping
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import CONVERSION_DIR
from mixchat.weights.matrix.linear import Layout


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
        if not is_half_converted(installed):
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
        assert is_half_converted(installed) != untouched
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
