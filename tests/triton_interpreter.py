"""Lets Triton's interpreter compute with bf16 as GPUs do.

By itself it rounds towards zero, takes the bits of a bf16 for an integer where it casts from or to
one, and where it multiplies matrices. It also changes all functions of Triton's language anew at
each call of a function in a kernel, which takes 5 ms, and most of a kernel's time.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def compute_bf16() -> None:
    """Change the interpreter of this process. A second call changes nothing."""
    interpreter._convert_float = _converted
    interpreter.InterpreterBuilder.cast_impl = _cast
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter._patch_lang = _patch_once


_usual, _usual_cast = interpreter._convert_float, interpreter.InterpreterBuilder.cast_impl
_usual_dot, _usual_patch = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang
_patched: set[frozenset[str]] = set()  # the names of modules


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
