"""Weights as llama.cpp and ik_llama.cpp round them, by the functions of their own libraries.

Both get an importance matrix. Their blocks want rows of whole multiples of 256 weights.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGMLQuantizationType

# ik_llama.cpp's trellis codes, which gguf does not know.
NUMBERS = {one.name: one.value for one in GGMLQuantizationType} | {"IQ2_KT": 153, "IQ3_KT": 154}
PIECE = 64  # rows that one thread rounds at a time
Type = str | Callable[[int, int], str]  # a type, or one by the layer and the count of layers


def _more_bits(more: str, less: str) -> Type:
    """Return the mix of llama-quantize's formats M: more in the outer eighths and every third."""

    def choose(layer: int, layers: int) -> str:
        outer = layer < layers // 8 or layer >= 7 * layers // 8
        return more if outer or (layer - layers // 8) % 3 == 2 else less

    return choose


def _first(count: int, more: str, less: str) -> Type:
    return lambda layer, _: more if layer < count else less


@dataclass(frozen=True)
class PeerForm:
    """A format: the type of each matrix.

    Names with an M are llama-quantize's mixes. Under all other names the matrices of the
    feed-forward blocks, of queries and of keys have the type of the name. llama-quantize gives some
    of them more bits, and so it does here to values, outputs and the head.
    """

    name: str
    gate_up: str
    down: Type
    qk: str
    v: Type
    o: str
    head: str

    def type_of(self, matrix: str, layers: int) -> str | None:
        """Return the type of a matrix of a Mixtral checkpoint, or None if it stays in 16 bits."""
        kinds = {r"w[13]": self.gate_up, r"w2": self.down, r"[qk]_proj": self.qk}
        kinds |= {r"v_proj": self.v, r"o_proj": self.o, r"lm_head": self.head}
        for pattern, kind in kinds.items():
            if re.search(rf"\b{pattern}\.weight$", matrix):
                layer = re.search(r"layers\.(\d+)", matrix)
                number = int(layer[1]) if layer else 0
                return kind if isinstance(kind, str) else kind(number, layers)
        return None


def _uniform(name: str, v: str, o: str, head: str) -> PeerForm:
    return PeerForm(name, name, name, name, v, o, head)


FORMS = {
    "llama.cpp": (
        PeerForm("Q4_0", *["Q4_0"] * 5, "Q6_K"),
        PeerForm(
            "Q4_K_M", "Q4_K", _more_bits("Q6_K", "Q4_K"), "Q4_K", _more_bits("Q6_K", "Q4_K"),
            "Q4_K", "Q6_K",
        ),
        PeerForm(
            "Q3_K_M", "Q3_K", _first(1, "Q5_K", "Q4_K"), "Q3_K", _first(2, "Q5_K", "Q4_K"),
            "Q4_K", "Q6_K",
        ),
        _uniform("IQ3_S", "IQ3_S", "IQ3_S", "Q6_K"),
        _uniform("IQ3_XXS", "IQ3_XXS", "IQ3_S", "Q5_K"),
        _uniform("IQ2_XS", "Q2_K", "IQ2_XS", "Q5_K"),
        _uniform("IQ2_S", "IQ3_S", "IQ3_S", "Q5_K"),
    ),
    "ik_llama.cpp": (
        _uniform("IQ3_KT", "IQ3_S", "IQ3_S", "Q5_K"),
        _uniform("IQ2_KT", "IQ3_S", "IQ3_S", "Q5_K"),
    ),
}  # fmt: skip


class _Memory(ctypes.Structure):
    _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("none", ctypes.c_bool))


class PeerLibrary:
    """libggml of one of the programs."""

    def __init__(self, path: Path) -> None:
        self._ggml = ctypes.CDLL(str(path))
        self._ggml.ggml_init.restype = ctypes.c_void_p
        self._ggml.ggml_init.argtypes = [_Memory]
        # Without a context, ik_llama.cpp has no table of 16-bit numbers, and takes all for 0.
        self._ggml.ggml_init(_Memory(1 << 20, None, False))
        self._ggml.ggml_row_size.restype = ctypes.c_size_t
        self._ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
        self._ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        pointers, counts = [ctypes.c_void_p] * 2, [ctypes.c_int64] * 3
        self._ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *pointers, *counts, pointers[0]]

    def bits(self, kind: str, columns: int) -> float:
        """Return the bits of a weight."""
        return 8 * self._ggml.ggml_row_size(NUMBERS[kind], columns) / columns

    def rounded(self, weight: torch.Tensor, kind: str, importance: torch.Tensor) -> torch.Tensor:
        """Return a matrix [R, C] as it is after rounding, with an importance of each column [C]."""
        exact, importance = weight.float().contiguous(), importance.float().contiguous()
        found = torch.empty_like(exact)
        decode = getattr(self._ggml, f"dequantize_row_{kind.lower().replace('_k', '_K')}", None)
        decode = decode or getattr(self._ggml, f"dequantize_row_{kind.lower()}")
        decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]

        def one(first: int) -> None:
            rows, columns = exact[first : first + PIECE].shape
            size = self._ggml.ggml_row_size(NUMBERS[kind], columns)
            codes = (ctypes.c_char * (size * rows))()
            source = exact[first:].data_ptr()
            self._ggml.ggml_quantize_chunk(
                NUMBERS[kind], source, codes, 0, rows, columns, importance.data_ptr()
            )
            for row in range(rows):  # each may begin with a scale
                decode(ctypes.byref(codes, row * size), found[first + row].data_ptr(), columns)

        one(0)  # makes the tables of the type, which no two threads may do
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(one, range(PIECE, len(exact), PIECE)))
        return found
