"""A model that is made anew is the old one or the new one, whenever the process is killed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from care_tools import EXPERTS, flip, mend, verify
from rebuild_tools import DENSE, FIRST, HEAD, LAST, SHARED, reform, stop_at
from weight_tools import FOREIGN, Meter, files_of, write_files

from mixchat.base import machine, system
from mixchat.base.errors import CheckpointError, ResourceError
from mixchat.install import models
from mixchat.install.care.housekeeping import remove, sweep
from mixchat.install.make import rebuild
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.workspace import MODEL_DIR, settle, workspace


class Killed(BaseException):
    """The process is gone: nothing that it would do on its way out happens."""


class Killer:
    """Kills at the step numbered `at` of those that change the disk for good."""

    def __init__(self, at: int) -> None:
        self._at, self.steps = at, 0
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> Killer:
        steps = [(os, "fsync"), (os, "replace"), (os, "rename"), (os, "link"), (shutil, "rmtree")]
        for place, name in [*steps, (Path, "unlink"), (Path, "rmdir"), (system, "exchange")]:
            self.patch.setattr(place, name, self._counted(getattr(place, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.undo()

    def _counted(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if not str(arguments[0]).endswith(".lock"):  # which ends with a process
                if self.steps == self._at:
                    raise Killed
                self.steps += 1
            return act(*arguments, **options)

        return counted


def kill_at(step: int, work: Callable[[], object]) -> bool:
    """Work until that step. Return whether it was reached."""
    with Killer(step):
        try:
            work()
        except Killed:
            return True
    return False


@pytest.fixture(params=[True, False], ids=["exchanged", "renamed twice"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can exchange two names."""
    if not request.param:
        monkeypatch.setattr(system, "exchange", lambda one, other: False)
    return bool(request.param)


@pytest.fixture(scope="module")
def both(tiny_checkpoint: Path, install: Callable[..., Path]) -> dict[str, Path]:
    """A model with attention and head in 16 bits, and rounded. Do not write into them."""
    return {"wide": install(tiny_checkpoint, **DENSE), "rounded": install(tiny_checkpoint)}


@pytest.fixture
def installed(both: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the wide one that a test may change."""
    return Path(shutil.copytree(both["wide"], tmp_path / "models" / "mine"))


@pytest.fixture
def home(home: Path, cache: Path) -> Path:
    models.models_dir().mkdir(parents=True)
    return home


def is_whole(directory: Path) -> bool:
    return verify(directory) == []


class TestKilled:
    """A model of which some files were new could not be used without this command, for good."""

    @pytest.mark.parametrize("foreign", [{}, FOREIGN], ids=["alone", "with notes"])
    def test_a_rounding(self, both, home, exchanges, foreign):
        before, after = both["wide"], both["rounded"]
        step, killed, states = 0, True, set()
        while killed:
            mine = Path(shutil.copytree(before, models.models_dir() / "mine"))
            write_files(mine, foreign)
            killed = kill_at(step, lambda mine=mine: reform(mine))
            if exchanges:
                assert is_whole(mine)
                states.add(files_of(mine).keys() >= foreign.keys())
            list(sweep())
            assert files_of(mine) in (files_of(before) | foreign, files_of(after) | foreign)
            reform(mine)
            assert files_of(mine) == files_of(after) | foreign
            assert os.listdir(models.models_dir()) == ["mine"]
            shutil.rmtree(mine)
            step += 1
        assert step > 30

    def test_a_repair(self, tiny_checkpoint, install, home, exchanges):
        whole, step, killed = install(tiny_checkpoint), 0, True
        while killed:
            mine = Path(shutil.copytree(whole, models.models_dir() / "mine"))
            flip(mine / EXPERTS, 5000)
            write_files(mine, FOREIGN)
            killed = kill_at(step, lambda mine=mine: mend(mine, tiny_checkpoint))
            settle(mine)
            mend(mine, tiny_checkpoint)
            list(sweep(unfinished=True))
            assert files_of(mine) == files_of(whole) | FOREIGN
            assert os.listdir(models.models_dir()) == ["mine"]
            shutil.rmtree(mine)
            step += 1
        assert step > 15

    def test_a_removal(self, tiny_model, home):
        step, killed, left = 0, True, set()
        while killed:
            mine = Path(shutil.copytree(tiny_model, models.models_dir() / "mine"))
            write_files(mine, FOREIGN)
            killed = kill_at(step, lambda mine=mine: remove(mine))
            list(sweep())
            files = files_of(mine)
            assert files in (files_of(tiny_model) | FOREIGN, FOREIGN)
            left.add(len(files))
            shutil.rmtree(mine)
            step += 1
        assert len(left) == 2


class TestResumed:
    def test_twice_in_a_row(self, both, installed):
        for step in (12, 8, 4):
            assert kill_at(step, lambda: reform(installed))
        reform(installed)
        assert files_of(installed) == files_of(both["rounded"])

    @pytest.mark.parametrize(
        ("name", "error"),
        [
            ("model.layers.1.self_attn.o_proj.weight", KeyboardInterrupt()),
            (HEAD, OSError(errno.ENOSPC, "No space left on device")),
        ],
    )
    def test_what_is_made_is_not_made_again(self, both, installed, monkeypatch, name, error):
        with monkeypatch.context() as patch:
            stop_at(patch, name, error)
            with pytest.raises(type(error)):
                reform(installed)
        assert files_of(installed) == files_of(both["wide"])
        meter = Meter()
        reform(installed, meter)
        assert meter.bar("rounding mine").first > 0
        assert meter.notes[0].startswith("rounding takes")
        assert files_of(installed) == files_of(both["rounded"])

    def test_work_of_another_command_starts_again(
        self, both, installed, tiny_checkpoint, monkeypatch
    ):
        with monkeypatch.context() as patch:
            stop_at(patch, HEAD, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                reform(installed)
        flip(installed / LAST, 5000)
        mend(installed, tiny_checkpoint)
        assert files_of(installed) == files_of(both["wide"])
        meter = Meter()
        reform(installed, meter)
        assert meter.bar("rounding mine").first == 0
        assert files_of(installed) == files_of(both["rounded"])


def test_only_the_file_that_changes_is_written(installed):
    before = {path.name: path.stat().st_ino for path in installed.iterdir()}
    reform(installed)
    changed = {path.name for path in installed.iterdir() if path.stat().st_ino != before[path.name]}
    assert {name for name in changed if name.endswith(".safetensors")} == {SHARED}


def test_without_room_for_the_new_files_nothing_is_changed(installed, monkeypatch):
    before = files_of(installed)
    monkeypatch.setattr(machine, "free_disk", lambda directory: 16_000_000)
    with pytest.raises(ResourceError, match="not enough disk"):
        reform(installed)
    assert files_of(installed) == before


def test_a_damaged_tensor_that_would_be_copied_is_found(installed):
    flip(installed / SHARED, 5000)
    before = files_of(installed)
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        reform(installed)
    assert "mixchat repair" in (caught.value.hint or "")
    assert files_of(installed) == before


def test_a_file_that_was_linked_and_is_damaged_since_is_not_written_in_place(
    tiny_checkpoint, installed, both, monkeypatch
):
    """The new model's file is the old one's until it is made."""
    flip(installed / FIRST, 5000)
    with monkeypatch.context() as patch:
        stop_at(patch, FIRST, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            mend(installed, tiny_checkpoint)
    assert (workspace(installed) / MODEL_DIR / LAST).samefile(installed / LAST)
    flip(installed / LAST, 5000)
    with InstalledModel(installed) as model:
        before = (installed / LAST).read_bytes()
        mend(installed, tiny_checkpoint)
        assert files_of(installed) == files_of(both["wide"])
        with open(f"/proc/self/fd/{model._experts[1]._fd}", "rb") as file:
            assert file.read() == before


def test_without_links_files_are_copied_and_the_disk_is_counted(
    tiny_checkpoint, install, tmp_path, monkeypatch
):
    meters = [Meter(), Meter()]
    wide = install(tiny_checkpoint, **DENSE)
    dense, other = (Path(shutil.copytree(wide, tmp_path / name)) for name in ("dense", "other"))

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no links")

    reform(dense, meters[0])
    monkeypatch.setattr(os, "link", refused)
    reform(other, meters[1])
    assert files_of(other) == files_of(dense)
    assert meters[0].notes[0].split(" of ")[0] != meters[1].notes[0].split(" of ")[0]


class TestLoadingBeside:
    """It is loaded as it was, or not at all.

    The manifest was read, then the files were opened: those that a rebuild had replaced in between
    were read as what they no longer were, and the text was nonsense.
    """

    @pytest.mark.parametrize("moment", [SHARED, FIRST, LAST])
    def test_files_of_two_models_are_not_loaded(self, installed, monkeypatch, moment):
        opened = InstalledModel._open

        def beside(model: InstalledModel, name: str, expected: Any) -> Any:
            file = opened(model, name, expected)
            if name == moment:
                monkeypatch.undo()
                reform(installed)
            return file

        monkeypatch.setattr(InstalledModel, "_open", beside)
        with pytest.raises(CheckpointError, match="changed while it was being loaded"):
            InstalledModel(installed)
        with InstalledModel(installed):
            pass

    def test_a_file_that_was_replaced_since_is_not_opened_past_the_page_cache(
        self, installed, monkeypatch
    ):
        monkeypatch.setattr(rebuild, "_has_links", lambda directory: False)
        with InstalledModel(installed) as model:
            stride = model.blueprint.expert.stride
            before, after = (torch.empty(stride, dtype=torch.uint8) for _ in range(2))
            model.read_expert(0, 1, before)
            reform(installed)
            assert not model.open_direct()
            model.read_expert(0, 1, after)
            assert torch.equal(before, after)
