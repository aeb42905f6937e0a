"""Computes the chosen experts of one token on a GPU, in two kernels.

The experts' addresses are read from a table in the GPU's memory, by the numbers that the router
wrote there. So the host does not wait for the router. Address 0 is that of an expert that lies
elsewhere, whose output is 0 here.

A dense MLP is an expert that is always chosen.

K = chosen experts, D = columns of x, I = columns between the matrices, E = experts, S = splits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mixchat.base.model_config import HiddenAct
from mixchat.kernels.gpu import codes as coded
from mixchat.kernels.gpu.launch import launch
from mixchat.kernels.gpu.product import Form, Split, band_product, constants, split

_HALVES = 2  # of the first matrix: gate and up
_THREADS_UP = 128  # for each of them


class ExpertMatrix(NamedTuple):
    """A matrix in the block of an expert, with the bytes at which its tensors begin."""

    form: Form
    codes_at: int
    absmax_at: int
    bias_at: int | None = None

    @property
    def is_supported(self) -> bool:
        """Return whether the kernels take this matrix."""
        places = (self.codes_at, self.absmax_at, self.bias_at or 0)
        return self.form.is_supported and all(place % 16 == 0 for place in places)

    def constants(self, threads: int, *, halves: int = 1) -> dict[str, Any]:
        """Return `constants` of the matrix, and its places."""
        places = {"CODES_AT": self.codes_at, "ABSMAX_AT": self.absmax_at, "BIAS_AT": self.bias_at}
        return places | constants(self.form, threads, halves=halves)


class ExpertForm(NamedTuple):
    """The form of an expert in memory, and the function between its matrices.

    gate_up: [2 I, D], the rows of gate first. down: [D, I]. limit, alpha and act: as in `Swiglu`.
    """

    gate_up: ExpertMatrix
    down: ExpertMatrix
    limit: float | None = None
    alpha: float = 1.702
    act: HiddenAct = "silu"

    @property
    def is_supported(self) -> bool:
        """Return whether the kernels take this expert. A band has no rows of gate and up."""
        form = self.gate_up.form
        whole = form.quant_type == "none" or form.rows // 2 % form.tile.band == 0
        return whole and self.gate_up.is_supported and self.down.is_supported

    def split(self, choices: int) -> Split:
        """Return the split of the second matrix for K experts."""
        return split(self.down.form, choices)


class Levels(NamedTuple):
    """The levels of both matrices, from `codes.level_table`."""

    gate_up: torch.Tensor | None
    down: torch.Tensor | None


def experts_up(
    x: torch.Tensor,
    selected: torch.Tensor,
    addresses: torch.Tensor,
    form: ExpertForm,
    levels: Levels,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what the first matrices of the chosen experts make of x [D], gated, [K, I].

    selected: int32 [K]. addresses: int64 [E], of the blocks of experts, on a boundary of 16 bytes.
    """
    matrix = form.gate_up.form
    inner = matrix.rows // 2
    if out is None:
        out = x.new_empty(len(selected), inner)
    launch(
        _experts_up,
        (-(-inner // matrix.tile.band), len(selected)),
        *(x, selected, addresses, x if levels.gate_up is None else levels.gate_up, out),
        INNER=inner,
        LIMIT=form.limit,
        ALPHA=form.alpha,
        GELU=form.act == "gelu_pytorch_tanh",
        **form.gate_up.constants(_THREADS_UP, halves=_HALVES),
    )
    return out


def experts_down(
    gated: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    addresses: torch.Tensor,
    form: ExpertForm,
    levels: Levels,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the outputs of the chosen experts times their weights fp32 [K].

    They are partial sums fp32 [K * S, D] with the S of `ExpertForm.split`. gated: [K, I]. The
    other arguments are as in `experts_up`.
    """
    matrix = form.down.form
    parts = form.split(len(selected))
    if out is None:
        out = weights.new_empty(len(selected) * parts.count, matrix.rows)
    launch(
        _experts_down,
        (-(-matrix.stored_rows // matrix.tile.band), parts.count, len(selected)),
        *(gated, selected, weights, addresses),
        *(gated if levels.down is None else levels.down, out),
        ROWS=matrix.rows,
        PER=parts.blocks,
        **form.down.constants(parts.threads),
    )
    return out


@triton.jit
def _experts_up(
    x,
    selected,
    addresses,
    levels,
    out,
    CODES_AT: tl.constexpr,
    ABSMAX_AT: tl.constexpr,
    BIAS_AT: tl.constexpr,
    INNER: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    GELU: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
    TYPE: tl.constexpr,
):
    BAND: tl.constexpr = coded.tile("band", TYPE)
    PARTS: tl.constexpr = coded.tile("parts", TYPE)
    row = tl.program_id(0) * BAND + coded.row_of(TYPE)
    at = out + tl.program_id(1) * INNER + row
    address = tl.load(addresses + tl.load(selected + tl.program_id(1)))
    if address == 0:
        tl.store(at, tl.zeros((BAND,), out.dtype.element_ty), mask=row < INNER)
    else:
        block = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
        # The first threads have the rows of gate, and the others the rows of up.
        thread = tl.arange(0, 2 * T)
        sums = band_product(
            x,
            (0,),
            block + CODES_AT,
            block + ABSMAX_AT,
            coded.table(levels, LANES, TYPE),
            tl.program_id(0) * BAND + thread // T * INNER,
            thread % T,
            0,
            C // coded.tile("block", TYPE),
            R,
            C,
            T,
            TYPE,
        )
        both = tl.sum(sums[0].reshape(2, T // PARTS, BAND), 1)
        gate, up = tl.split(both.permute(1, 0))
        if BIAS_AT is not None:
            bias = (block + BIAS_AT).to(tl.pointer_type(tl.float32)) + row
            gate += tl.load(bias, mask=row < INNER, other=0)
            up += tl.load(bias + INNER, mask=row < INNER, other=0)
        if GELU:
            inner = (gate + 0.044715 * gate * gate * gate) * 1.5957691216057308
            gated = gate * tl.sigmoid(inner) * up
        elif LIMIT is None:
            gated = gate * tl.sigmoid(gate) * up
        else:
            gate = tl.minimum(gate, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
            gated = (up + 1) * (gate * tl.sigmoid(gate * ALPHA))
        tl.store(at, gated.to(out.dtype.element_ty), mask=row < INNER)


@triton.jit
def _experts_down(
    gated,
    selected,
    weights,
    addresses,
    levels,
    out,
    CODES_AT: tl.constexpr,
    ABSMAX_AT: tl.constexpr,
    BIAS_AT: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    PER: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
    TYPE: tl.constexpr,
):
    BAND: tl.constexpr = coded.tile("band", TYPE)
    choice = tl.program_id(2)
    row = tl.program_id(0) * BAND + coded.row_of(TYPE)
    at = out + (choice * tl.num_programs(1) + tl.program_id(1)) * ROWS + row
    address = tl.load(addresses + tl.load(selected + choice))
    if address == 0:
        tl.store(at, tl.zeros((BAND,), tl.float32), mask=row < ROWS)
    else:
        block = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
        thread = tl.arange(0, T)
        first = tl.program_id(1) * PER
        sums = band_product(
            gated + choice * C,
            (0,),
            block + CODES_AT,
            block + ABSMAX_AT,
            coded.table(levels, LANES, TYPE),
            tl.program_id(0) * BAND + thread * 0,
            thread,
            first,
            tl.minimum(first + PER, C // coded.tile("block", TYPE)),
            R,
            C,
            T,
            TYPE,
        )
        total = tl.sum(sums[0].reshape(T // coded.tile("parts", TYPE), BAND), 0)
        if BIAS_AT is not None and tl.program_id(1) == 0:
            bias = (block + BIAS_AT).to(tl.pointer_type(tl.float32)) + row
            total += tl.load(bias, mask=row < ROWS, other=0)
        tl.store(at, total * tl.load(weights + choice), mask=row < ROWS)
