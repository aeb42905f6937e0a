"""Lets Triton's interpreter compute with bf16 as GPUs do.

By itself it rounds towards zero, and multiplies matrices of bf16 as if their bits were integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def compute_bf16() -> None:
    """Change the interpreter of this process. A second call changes nothing."""
    interpreter._convert_float = _converted
    interpreter.InterpreterBuilder.create_dot = _dot


_usual, _usual_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


def _converted(numbers: Any, source: Any, target: Any, rounding: Any) -> Any:
    if (source, target) == (tl.float32, tl.bfloat16):
        wide = torch.from_numpy(np.ascontiguousarray(numbers).view(np.float32))
        return wide.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(numbers.shape)
    if (source, target) == (tl.bfloat16, tl.float32):
        return numbers.view(np.uint16).astype(np.uint32) << 16
    return _usual(numbers, source, target, rounding)


def _dot(builder: Any, left: Any, right: Any, *others: Any) -> Any:
    if left.dtype.scalar == tl.bfloat16:
        left, right = (builder.cast_impl(matrix, tl.float32) for matrix in (left, right))
    return _usual_dot(builder, left, right, *others)
