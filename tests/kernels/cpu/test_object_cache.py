"""Machine code is cached from run to run, for its owner alone, and not used where it is damaged."""

import ctypes
import grp
import os
import pwd
import stat
from pathlib import Path
from typing import Any

import pytest
from llvmlite import ir

from mixchat.base.settings import data_dir
from mixchat.kernels.cpu import compile as compiling
from mixchat.kernels.cpu import object_cache
from mixchat.kernels.cpu.compile import compile_module, compiled_here, instruction_set
from mixchat.kernels.cpu.emit import Function, i64
from mixchat.kernels.cpu.four_bit_units import FOUR_BITS, MXFP4_UNITS
from mixchat.kernels.cpu.object_cache import _MOST_FILES, ObjectCache
from mixchat.kernels.cpu.pages import CacheShape
from mixchat.kernels.cpu.plane_units import SIX_BITS
from mixchat.kernels.cpu.trellis_units import TRELLIS_2, TRELLIS_3
from mixchat.kernels.cpu.units import EIGHT_BITS


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache that a person has, in place of the one that all tests share."""
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    monkeypatch.setattr(object_cache, "data_dir", data_dir)
    monkeypatch.setattr(object_cache, "_MOST_FILES", _MOST_FILES)
    return tmp_path / "kernels"


def adding(number: int) -> int:
    """Compile a function that adds a number, and let it add that to 40."""

    def text() -> str:
        module = ir.Module("test")
        function = Function(module, "tested")
        function.pointer.store(function.pointer.load(i64) + number)
        function.finish()
        return str(module)

    space = (ctypes.c_int64 * 1)(40)
    compiled = compile_module(text, instruction_set() or "avx2", f"adds {number}")
    compiled.function("tested").run(space, 1)
    return space[0]


@pytest.mark.skipif(instruction_set() is None, reason="kernels need AVX2")
def test_what_was_compiled_before_is_not_compiled_again(place, monkeypatch):
    assert adding(2) == 42
    (file,) = place.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    optimized = []
    optimize = compiling.optimize

    def counting(*module: Any) -> None:
        optimized.append(module)
        optimize(*module)

    monkeypatch.setattr(compiling, "optimize", counting)
    assert adding(2) == 42
    assert optimized == []
    assert adding(3) == 43  # another module
    assert len(optimized) == 1


@pytest.mark.skipif(instruction_set() is None, reason="kernels need AVX2")
def test_what_was_compiled_before_is_not_written_again(place):
    """A third of a second of each start went into the text of modules that were compiled."""
    written = []

    def write(module: Any, lanes: int, shape: CacheShape) -> None:
        written.append(shape)
        Function(module, "tested").finish()

    shapes = CacheShape(8, 2, 48, 16), CacheShape(8, 2, 48, 8)
    for shape in (*shapes, *shapes):
        compiled_here(write)(shape).function("tested")
    assert written == [*shapes]


def test_units_have_names_of_their_own():
    """They are parts of the keys of machine code."""
    sets = (FOUR_BITS, MXFP4_UNITS, SIX_BITS, EIGHT_BITS, TRELLIS_2, TRELLIS_3)
    units = [
        unit
        for each in sets
        for choices in (*each.many.values(), *each.alone.values(), each.words.values())
        for unit in choices
    ]
    assert len({repr(unit) for unit in units}) == len(units)
    assert not [unit for unit in units if " at 0x" in repr(unit)]


@pytest.mark.skipif(instruction_set() is None, reason="kernels need AVX2")
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_code_is_compiled_again(place, damage):
    assert adding(2) == 42
    (file,) = place.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"cut": content[:100], "flipped": content, "empty": b""}[damage])
    assert adding(2) == 42
    assert adding(2) == 42


OTHER = 12345  # a user's number, not ours


@pytest.fixture
def cached(tmp_path: Path) -> tuple[Path, ObjectCache, Path]:
    """A home, the cache in it, and the file that the cache has written."""
    cache = ObjectCache("source", "target", tmp_path / "home" / "kernels")
    cache.save(b"code")
    assert cache.load() == b"code"
    (file,) = (tmp_path / "home" / "kernels").iterdir()
    return tmp_path / "home", cache, file


Cached = tuple[Path, ObjectCache, Path]


def places(cached: Cached) -> dict[str, Path]:
    home, _, file = cached
    return {"file": file, "directory": file.parent, "home": home, "above": home.parent}


@pytest.mark.parametrize("mode", [0o777, 0o707])
@pytest.mark.parametrize("place", ["file", "directory", "home", "above"])
def test_what_others_could_have_written_is_not_used(cached, place, mode):
    """In a MIXCHAT_HOME that all can write to, another user's code ran."""
    path = places(cached)[place]
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode)
    assert cached[1].load() is None
    cached[1].save(b"new code")
    path.chmod(before)
    if place != "file":  # which is replaced by one that nobody else can write
        assert cached[1].load() == b"code"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("place", ["file", "directory", "home", "above"])
def test_what_belongs_to_another_is_not_used(cached, place):
    os.chown(places(cached)[place], OTHER, -1)
    assert cached[1].load() is None


def test_a_sticky_directory_above_is_no_harm(cached):
    cached[0].chmod(0o1777)
    assert cached[1].load() == b"code"
    cached[2].parent.chmod(0o1777)  # the directory itself: others could make its files
    assert cached[1].load() is None


def test_a_directory_that_the_users_own_group_can_write_is_no_harm(cached, monkeypatch):
    """The mode of ~/.local/share is 775 where each user has a group of their own."""
    cached[0].chmod(0o775)
    monkeypatch.setattr(object_cache, "_is_own_group", lambda gid: True)
    assert cached[1].load() == b"code"
    monkeypatch.setattr(object_cache, "_is_own_group", lambda gid: False)
    assert cached[1].load() is None
    monkeypatch.undo()
    user = pwd.getpwuid(os.geteuid())
    mates = grp.struct_group((user.pw_name, "x", user.pw_gid, ["mate"]))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: mates)
    assert cached[1].load() is None


def test_links_are_not_followed(cached, tmp_path):
    _, cache, file = cached
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert cache.load() is None
    cache.save(b"new code")
    assert (file.is_symlink(), cache.load()) == (False, b"new code")
    before = elsewhere.read_bytes()
    file.parent.rename(tmp_path / "kernels")
    file.parent.symlink_to(tmp_path / "kernels")
    assert cache.load() is None
    cache.save(b"newer code")
    assert ObjectCache("source", "target", tmp_path / "kernels").load() == b"new code"
    assert elsewhere.read_bytes() == before


def test_a_pipe_in_its_place_is_not_waited_for(cached):
    cached[2].unlink()
    os.mkfifo(cached[2], 0o600)
    assert cached[1].load() is None


def test_code_belongs_to_its_source_and_its_target(tmp_path):
    ObjectCache("source", "target", tmp_path / "k").save(b"code")
    assert ObjectCache("source", "target", tmp_path / "k").load() == b"code"
    assert ObjectCache("source", "other", tmp_path / "k").load() is None
    assert ObjectCache("other", "target", tmp_path / "k").load() is None


def test_of_too_many_files_the_oldest_go(tmp_path):
    for number in range(_MOST_FILES + 3):
        cache = ObjectCache(str(number), "", tmp_path / "k")
        cache.save(b"code")
        os.utime(tmp_path / "k" / cache._name, (number, number))
    left = [
        number
        for number in range(_MOST_FILES + 3)
        if ObjectCache(str(number), "", tmp_path / "k").load()
    ]
    assert left == [*range(3, _MOST_FILES + 3)]


def test_files_that_the_cache_did_not_write_stay(tmp_path):
    """The oldest files of any name were removed, and all whose names ended with .tmp."""
    directory = tmp_path / "kernels"
    cache = ObjectCache("source", "target", directory)
    cache.save(b"code")
    foreign = ["main.o", "thesis.tmp", *(f"{number}.o" for number in range(_MOST_FILES))]
    for name in foreign:
        (directory / name).write_bytes(b"mine")
        os.utime(directory / name, (0, 0))
    abandoned = directory / "0123.x1.mixchat.tmp"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    cache.save(b"code")
    assert {path.name for path in directory.iterdir()} == {cache._name, *foreign}
