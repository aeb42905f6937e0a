"""A conversion that is cut off anywhere leaves a model that answers."""

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
    AS_STORED,
    DENSE,
    EIGHT,
    FIRST,
    LAST,
    is_half_converted,
    pack,
    reform,
    stop_at,
    text_of,
)
from weight_tools import files_of

from mixchat.base.options import DenseBits
from mixchat.cli.output.reports import ModelList
from mixchat.weights import models
from mixchat.weights.care import housekeeping
from mixchat.weights.format.manifest import MANIFESTS
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
    def test_killed_at_any_step_it_answers_and_the_same_command_converts_the_rest(
        self, name, tiny_checkpoint, install, tmp_path
    ):
        """A model that was half converted could not be loaded, for good without this command."""
        before, after, requested, least = CONVERSIONS[name]
        original = install(tiny_checkpoint, **{"layout": "bitsandbytes", **before})
        expected, step, mixed = files_of(install(tiny_checkpoint, **after)), 0, 0
        texts = [text_of(original), text_of(install(tiny_checkpoint, **after))]
        killed = True
        while killed:
            installed = Path(shutil.copytree(original, tmp_path / str(step) / "mine"))
            if killed := kill_at(installed, step, *requested):
                assert verify(installed) == []
                assert text_of(installed) in texts
                mixed += is_half_converted(installed)
                self.sweep(installed)
                assert verify(installed) == []
                reform(installed, *requested)
            assert files_of(installed) == expected
            shutil.rmtree(installed)
            step += 1
        assert step > least
        assert mixed == 0 if name == "bits" else mixed > least // 2

    def sweep(self, installed: Path) -> None:
        """Remove what `gc` removes of a finished model."""
        for path in housekeeping._left_in(installed):
            housekeeping._cleared(path, resumable=False)

    def test_twice_in_a_row_it_still_resumes(self, both, installed):
        for step in (12, 8, 4):
            assert kill_at(installed, step)
        pack(installed)
        assert files_of(installed) == files_of(both["cpu-packed"])

    @pytest.mark.parametrize("name", ["shared.safetensors", FIRST, LAST])
    def test_stopped_at_a_file_it_resumes_there(self, both, installed, monkeypatch, name):
        with monkeypatch.context() as patch:
            stop_at(patch, name, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                pack(installed)
        assert is_half_converted(installed) == (name != "shared.safetensors")
        assert set(files_of(installed)) == set(files_of(both["cpu-packed"]))
        inodes = {path.name: path.stat().st_ino for path in installed.iterdir()}
        pack(installed)
        kept = {
            path.name for path in installed.iterdir() if path.stat().st_ino == inodes[path.name]
        }
        order = ["shared.safetensors", FIRST, LAST]
        assert kept & {*order} == {*order[: order.index(name)]}
        assert files_of(installed) == files_of(both["cpu-packed"])

    def test_a_full_disk_leaves_what_can_be_resumed(self, both, installed, monkeypatch):
        with monkeypatch.context() as patch:
            stop_at(patch, LAST, OSError(errno.ENOSPC, "No space left on device"))
            with pytest.raises(OSError, match="No space"):
                pack(installed)
        assert verify(installed) == []
        pack(installed)
        assert files_of(installed) == files_of(both["cpu-packed"])

    def test_it_can_be_taken_back(self, both, installed, monkeypatch):
        with monkeypatch.context() as patch:
            stop_at(patch, LAST, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                pack(installed)
        assert reform(installed, "bitsandbytes")
        assert files_of(installed) == files_of(both["bitsandbytes"])

    def test_it_is_listed_as_partly_converted_and_gc_leaves_it_alone(self, installed, monkeypatch):
        stop_at(monkeypatch, LAST, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            pack(installed)
        entry = models.describe(installed)
        assert (entry.problem, entry.partly) == (None, "converted")
        assert "nf4, partly converted" in ModelList([entry]).as_text()
        assert list(housekeeping._left_in(installed)) == []

    def test_a_new_file_stays_if_no_manifest_tells_whether_it_is_used(self, installed):
        (installed / f"{LAST}.0.mixchat.new").write_bytes(b"perhaps")
        for name in MANIFESTS:
            (installed / name).write_text("{")
        assert list(housekeeping._left_in(installed)) == []

    def test_foreign_files_next_to_a_model_that_is_converted_stay(self, both, installed):
        """Whatever ended with .new was removed, and whatever ended with .tmp by the next gc."""
        foreign = {name: b"mine" for name in ("thesis.new", f"{LAST}.new", f"{LAST}.new.tmp")}
        for name, data in foreign.items():
            (installed / name).write_bytes(data)
        pack(installed)
        assert files_of(installed) == files_of(both["cpu-packed"]) | foreign
        assert list(housekeeping._left_in(installed)) == []
