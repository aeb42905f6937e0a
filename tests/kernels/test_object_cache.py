"""Machine code is kept from run to run, for its owner alone, and never used where it is damaged."""

import ctypes
import os
import stat
from pathlib import Path

import pytest
from llvmlite import ir

from mixchat.kernels import compile as compiling
from mixchat.kernels.compile import compile_module, instruction_set
from mixchat.kernels.emit import Function, i64
from mixchat.kernels.object_cache import _KEPT, ObjectCache


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path))
    return tmp_path / "kernels"


def adding(number: int) -> int:
    """Compile a function that adds a number, and let it add that to 40."""
    module = ir.Module("test")
    function = Function(module, "tested")
    function.pointer.store(function.pointer.load(i64) + number)
    function.finish()
    space = (ctypes.c_int64 * 1)(40)
    compile_module(module, instruction_set() or "avx2").function("tested").run(space, 1)
    return space[0]


@pytest.mark.skipif(instruction_set() is None, reason="kernels need AVX2")
def test_what_was_compiled_before_is_not_compiled_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert adding(2) == 42
    (file,) = place.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    optimized = []
    monkeypatch.setattr(compiling, "_optimize", lambda *module: optimized.append(module))
    assert adding(2) == 42
    assert optimized == []
    assert adding(3) == 43  # another module
    assert len(optimized) == 1


@pytest.mark.skipif(instruction_set() is None, reason="kernels need AVX2")
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_code_is_made_anew(place: Path, damage: str) -> None:
    assert adding(2) == 42
    (file,) = place.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"cut": content[:100], "flipped": content, "empty": b""}[damage])
    assert adding(2) == 42
    assert adding(2) == 42


def test_what_others_could_have_written_is_not_used(tmp_path: Path) -> None:
    place = tmp_path / "kernels"
    cache = ObjectCache("source", "target", place)
    cache.save(b"code")
    assert cache.load() == b"code"
    place.chmod(0o777)
    assert cache.load() is None
    place.chmod(0o700)
    assert cache.load() == b"code"


def test_code_belongs_to_its_source_and_its_target(tmp_path: Path) -> None:
    ObjectCache("source", "target", tmp_path / "k").save(b"code")
    assert ObjectCache("source", "target", tmp_path / "k").load() == b"code"
    assert ObjectCache("source", "other", tmp_path / "k").load() is None
    assert ObjectCache("other", "target", tmp_path / "k").load() is None


def test_of_too_many_files_the_oldest_go(tmp_path: Path) -> None:
    for number in range(_KEPT + 3):
        cache = ObjectCache(str(number), "", tmp_path / "k")
        cache.save(b"code")
        os.utime(cache._path, (number, number))
    left = [
        number for number in range(_KEPT + 3) if ObjectCache(str(number), "", tmp_path / "k").load()
    ]
    assert left == [*range(3, _KEPT + 3)]


def test_a_place_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ObjectCache("source", "target", tmp_path / "file" / "kernels")
    cache.save(b"code")
    assert cache.load() is None
