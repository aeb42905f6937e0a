"""Lets Triton's interpreter compute with bf16 as GPUs do, and refuse what faults on GPUs.

By itself it rounds towards zero, takes the bits of a bf16 for an integer where it casts from or to
one, and where it multiplies matrices. It also changes all functions of Triton's language anew at
each call of a function in a kernel, which takes 5 ms, and most of a kernel's time.

It believes `tl.multiple_of`, as the compiler does, reads what lies behind a tensor, and computes
one thread after the other, which needs no barrier.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def compute_as_gpus() -> None:
    """Change the interpreter of this process. A second call changes nothing."""
    builder = interpreter.InterpreterBuilder
    interpreter._convert_float = _converted
    builder.cast_impl, builder.create_dot = _cast, _dot
    builder.create_masked_load, builder.create_masked_store = _load, _store
    builder.create_barrier, builder.create_atomic_rmw = _meet, _count
    builder.set_grid_idx = _begin
    interpreter.TensorHandle.set_attr = _set_attribute
    interpreter._patch_lang = _patch_once


@contextmanager
def confined_to(memory: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Refuse loads and stores outside of parts of memory, each an address and its bytes.

    A kernel that reads past a tensor's end computes the same, until the tensor is the last one in
    its memory.
    """
    global _memory
    before, parts = _memory, sorted((first, first + size) for first, size in memory if size)
    firsts, ends = np.array(parts, np.uint64).reshape(-1, 2).T
    _memory = firsts, np.maximum.accumulate(ends)  # one may contain another
    try:
        yield
    finally:
        _memory = before


_memory: tuple[Any, Any] | None = None  # first addresses and ends; None if there are no limits
_builder = interpreter.InterpreterBuilder
_usual_load, _usual_store = _builder.create_masked_load, _builder.create_masked_store
_usual_begin, _usual_count = _builder.set_grid_idx, _builder.create_atomic_rmw
_usual_attribute = interpreter.TensorHandle.set_attr
_usual, _usual_cast = interpreter._convert_float, interpreter.InterpreterBuilder.cast_impl
_usual_dot, _usual_patch = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang
_patched: set[frozenset[str]] = set()  # the names of modules


def _load(builder: Any, pointers: Any, mask: Any, *others: Any) -> Any:
    _check_places(pointers, mask)
    return _usual_load(builder, pointers, mask, *others)


def _store(builder: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
    _check_places(pointers, mask)
    builder.has_stored = True
    return _usual_store(builder, pointers, value, mask, *others)


def _begin(builder: Any, *program: int) -> None:
    builder.has_stored = False
    _usual_begin(builder, *program)


def _meet(builder: Any) -> None:
    builder.has_stored = False


def _count(builder: Any, *operands: Any) -> Any:
    """Count a program. Who sees the count reads what all its threads have stored."""
    if builder.has_stored:
        raise RuntimeError("no barrier between a program's stores and what tells of them")
    return _usual_count(builder, *operands)


def _check_places(pointers: Any, mask: Any) -> None:
    if _memory is None:
        return
    firsts, ends = _memory
    places = np.asarray(pointers.data, np.uint64)[np.asarray(mask.data, bool)]
    size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
    part = np.searchsorted(firsts, places, side="right") - 1
    if (part < 0).any() or (places + size > ends[part]).any():
        raise IndexError("a kernel leaves the memory that it was given")


def _set_attribute(handle: Any, name: str, values: Any) -> None:
    if name == "tt.divisibility" and handle.data.size == 1 and handle.data.item() % values[0]:
        raise ValueError(f"a kernel takes {handle.data.item()} for a multiple of {values[0]}")
    _usual_attribute(handle, name, values)


def _converted(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
    if (source, target) == (tl.float32, tl.bfloat16):
        wide = torch.from_numpy(np.ascontiguousarray(numbers).view(np.float32))
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(numbers.shape)
    if (source, target) == (tl.bfloat16, tl.float32):
        return numbers.view(np.uint16).astype(np.uint32) << 16
    return _usual(numbers, source, target, rounding)


def _cast(builder: Any, numbers: Any, target: Any) -> Any:
    if tl.bfloat16 in (numbers.dtype.scalar, target.scalar):
        numbers = _usual_cast(builder, numbers, tl.float32)
    return _usual_cast(builder, numbers, target)


def _dot(builder: Any, left: Any, right: Any, *others: Any) -> Any:
    if left.dtype.scalar == tl.bfloat16:
        left, right = (_cast(builder, matrix, tl.float32) for matrix in (left, right))
    return _usual_dot(builder, left, right, *others)


def _patch_once(function: Any) -> Any:
    modules = {v.__name__ for v in function.__globals__.values() if isinstance(v, ModuleType)}
    languages = frozenset(modules & {tl.__name__, tl.core.__name__})
    if languages not in _patched:
        _patched.add(languages)
        _usual_patch(function)
    return SimpleNamespace(restore=lambda: None)
