"""Reads matrices that bitsandbytes has already quantized to 4 bits.

Such a matrix `X` (a name that ends in ".weight") is several tensors:

    X                    the codes: [bytes, 1] in U8, or the same bytes as another type
    X.absmax             a scale for each block of weights: F32, or U8 if it is nested
    X.quant_map          F32 [16], the numbers that the codes stand for
    X.nested_absmax      F32, a scale for each block of the nested absmax ("double quantization")
    X.nested_quant_map   F32 [256], the numbers that the nested absmax stands for
    X.quant_state.bitsandbytes__nf4   or __fp4: a JSON object in U8, with shape, block sizes, ...

All of it is untrusted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mixchat.base.errors import CheckpointError
from mixchat.weights.matrix.nf4 import NF4, Quantized4bit, round_absmax
from mixchat.weights.matrix.quant_type import BLOCKSIZE

StoredType = Literal["nf4", "fp4"]
_LEVELS: dict[StoredType, torch.Tensor] = {
    "nf4": NF4.levels,
    # Three bits of a float and a sign.
    "fp4": torch.tensor([sign * level for sign in (1, -1) for level in (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0,
        0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    )]),
}  # fmt: skip
_STATES = {name: f"quant_state.bitsandbytes__{name}" for name in _LEVELS}
_NESTED = ("nested_absmax", "nested_quant_map")
_COMPONENTS = ("absmax", "quant_map", *_NESTED, *_STATES.values())
_MAX_STATE = 4096  # bytes of JSON
_KEYS = frozenset(("quant_type", "blocksize", "dtype", "shape"))
_NESTED_KEYS = frozenset(("nested_blocksize", "nested_dtype", "nested_offset"))
_BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes' sizes without 32
_FLOATS = ("bfloat16", "float16", "float32")
# The values of `bnb_4bit_quant_storage`, with the same bytes.
_STORAGE = (torch.uint8, torch.int8, *(getattr(torch, name) for name in _FLOATS), torch.float64)
_MAX_OFFSET = torch.finfo(torch.float32).max


def component_names(name: str, available: Collection[str]) -> tuple[str, ...]:
    """Return the names of the tensors that make up a matrix, its own first."""
    components = (f"{name}.{component}" for component in _COMPONENTS)
    return (name, *(component for component in components if component in available))


def is_quantized(name: str, available: Collection[str]) -> bool:
    """Return whether the names say that the matrix is quantized."""
    return len(component_names(name, available)) > 1


def quant_type(name: str, available: Collection[str]) -> StoredType | None:
    """Return the type of a matrix, from the names alone, or None if it is dense.

    Raises `CheckpointError` unless it is NF4 or FP4.
    """
    if not is_quantized(name, available):
        return None
    types = [type_ for type_, state in _STATES.items() if f"{name}.{state}" in available]
    if len(types) != 1:
        raise CheckpointError(
            f"{name}: quantized, but with {len(types)} descriptions (quant_state) of NF4 or FP4"
        )
    return types[0]


def read_matrix(
    name: str,
    read: Callable[[str], torch.Tensor],
    available: Collection[str],
    *,
    rows: int,
    columns: int,
) -> Quantized4bit:
    """Read and check a quantized matrix [rows, columns]. Raises `CheckpointError`.

    `read` must not check for NaN, because codes can be stored as a float type.
    """
    named = quant_type(name, available)
    if named is None:
        raise CheckpointError(f"{name}: not quantized by bitsandbytes")
    matrix = _Components(name, read, available)
    levels = _LEVELS[named]
    state = _read_state(matrix, named, [rows, columns])
    stored_levels = matrix.numbers("quant_map", torch.float32, 16)
    # Not compared bit by bit, because devices round the table differently.
    if not torch.allclose(stored_levels, levels, rtol=0, atol=1e-6):
        raise CheckpointError(f"{name}.quant_map: not the table of {named}")
    codes = matrix.read(name)
    size = (rows * columns + 1) // 2
    if codes.dtype not in _STORAGE:
        raise CheckpointError(f"{name}: 4-bit codes cannot be stored as {codes.dtype}")
    if tuple(codes.shape) != (codes.numel(), 1) or codes.nbytes != size:
        raise CheckpointError(
            f"{name}: {codes.dtype} {list(codes.shape)}, should be {size} bytes in one column"
        )
    absmax = _read_absmax(matrix, state, rows * columns)
    return Quantized4bit(NF4, rows, columns, codes.reshape(-1).view(torch.uint8), absmax, levels)


@dataclass(frozen=True)
class _Components:
    name: str
    get: Callable[[str], torch.Tensor]
    available: Collection[str]

    def read(self, name: str) -> torch.Tensor:
        if name not in self.available:
            raise CheckpointError(f"{name}: the tensor is missing")
        return self.get(name)

    def numbers(self, component: str, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Read a component. It has to be `count` finite numbers of this type."""
        name = f"{self.name}.{component}"
        tensor = self.read(name)
        if tensor.dtype != dtype or tuple(tensor.shape) != (count,):
            raise CheckpointError(
                f"{name}: {tensor.dtype} {list(tensor.shape)}, should be {dtype} {[count]}"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} holds NaN or infinity")
        return tensor


def _read_state(matrix: _Components, named: StoredType, shape: list[int]) -> dict[str, Any]:
    """Return the JSON object that describes a matrix, with right values."""
    name = f"{matrix.name}.{_STATES[named]}"
    raw = _parse(name, matrix.read(name))

    def check(key: str, right: bool) -> None:
        if not right:
            text = ascii(raw[key])
            text = text if len(text) <= 60 else f"{text[:60]}..."
            raise CheckpointError(f"{name}: the {key} {text} does not fit or is not supported")

    # `type(...) is int`, because True is an int in Python, and equals 1.
    numbers = raw["shape"] if isinstance(raw["shape"], list) else []
    check("quant_type", raw["quant_type"] == named)
    check("shape", numbers == shape and all(type(number) is int for number in numbers))
    check("blocksize", type(raw["blocksize"]) is int and raw["blocksize"] in _BLOCKSIZES)
    check("dtype", raw["dtype"] in _FLOATS)
    if raw.keys() >= _NESTED_KEYS:
        size = raw["nested_blocksize"]
        offset = raw["nested_offset"]
        check("nested_blocksize", type(size) is int and size in _BLOCKSIZES)
        check("nested_dtype", raw["nested_dtype"] in _FLOATS)
        # JSON's NaN and Infinity are floats in Python. No comparison holds for NaN.
        is_number = type(offset) in (int, float)
        check("nested_offset", is_number and -_MAX_OFFSET <= offset <= _MAX_OFFSET)
    elif any(f"{matrix.name}.{component}" in matrix.available for component in _NESTED):
        raise CheckpointError(f"{name}: does not describe the nested absmax that is there")
    return raw


def _parse(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1 or tensor.numel() > _MAX_STATE:
        raise CheckpointError(f"{name}: not a description of at most {_MAX_STATE} bytes")
    # Deep nesting raises RecursionError.
    try:
        raw = json.loads(bytes(tensor.tolist()).decode("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(f"{name}: not a JSON object") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{name}: not a JSON object")
    if raw.keys() not in (_KEYS, _KEYS | _NESTED_KEYS):
        raise CheckpointError(f"{name}: its keys are not those that bitsandbytes writes")
    return raw


def _read_absmax(matrix: _Components, state: dict[str, Any], weights: int) -> torch.Tensor:
    """Read the absmax in fp32, one for each 64 weights."""
    blocksize = state["blocksize"]
    nested_blocksize = state.get("nested_blocksize")
    count = -(-weights // blocksize)
    if nested_blocksize is None:
        absmax = matrix.numbers("absmax", torch.float32, count)
    else:
        # As bitsandbytes' `dequantize_blockwise` does.
        codes = matrix.numbers("absmax", torch.uint8, count)
        levels = matrix.numbers("nested_quant_map", torch.float32, 256)
        scales = matrix.numbers("nested_absmax", torch.float32, -(-count // nested_blocksize))
        wide = scales.repeat_interleave(nested_blocksize)[:count]
        # `nested_dtype` is not fp32 if saved after a run on a CPU.
        absmax = (levels[codes.int()] * wide).to(getattr(torch, state["nested_dtype"]))
        offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32)
        absmax = absmax.add_(offset).float()
    if not torch.isfinite(round_absmax(absmax)).all():
        raise CheckpointError(f"{matrix.name}.absmax: holds a scale that is too large")
    # Each smaller block has the scale of the larger block around it.
    return absmax.repeat_interleave(blocksize // BLOCKSIZE)[: -(-weights // BLOCKSIZE)]
