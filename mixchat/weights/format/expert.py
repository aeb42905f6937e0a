"""The block of an expert, with its matrices one after the other, and how it is computed.

An expert is w13, then w2, then zeros up to a multiple of 4096 bytes, so that each begins on a page
boundary, on disk and in memory. For Mixtral 8x7B in NF4:

    w13.absmax 3,670,016 | w13.codes 58,720,256 | w2.absmax 1,835,008 | w2.codes 29,360,128
    = 93,585,408 bytes = 22,848 pages, no padding
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import ALIGNMENT, TensorSpec
from mixchat.kernels.cpu.arrange import Slots, arrange_step
from mixchat.kernels.cpu.program import Program, Stage, Step, alone, together
from mixchat.kernels.cpu.quantized_matmul import grouped_matmul_steps
from mixchat.kernels.cpu.rows import Swiglu, can_compute
from mixchat.weights.matrix.linear import LinearSpec, PackedLinear, as_packed
from mixchat.weights.matrix.on_device import build_linear
from mixchat.weights.matrix.quant_type import Linear

# Arguments of a product: those that depend on the expert, and those that depend on its rows.
_OF_MATRIX = "codes", "absmax", "bias"
_OF_ROWS = "x_integers", "x_scales", "x_sums", "out", "tokens", "slots_taken"


@dataclass(frozen=True)
class Expert:
    """One expert, a function of x [n, D]. `exact` is as in `Linear`."""

    gate_up: Linear
    down: Linear
    swiglu: Swiglu

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Return w2(silu(w1 x) * w3 x) of x [n, D], [n, D], or with the model's other product."""
        return self.down(self.swiglu(self.gate_up(x, exact=exact)), exact=exact)

    @cached_property
    def addresses(self) -> list[int]:
        """Return the addresses of codes, absmax and bias of both matrices."""
        return [*as_packed(self.gate_up).addresses, *as_packed(self.down).addresses]

    def has_stages(self, x: torch.Tensor) -> bool:
        """Return whether `stages` and `ExpertSlots` take rows like x [T, D]."""
        matrices = self.gate_up, self.down
        if not all(isinstance(matrix, PackedLinear) and matrix.is_whole for matrix in matrices):
            return False
        return can_compute(x.dtype, as_packed(self.gate_up).rows // 2, x.device.type)

    def stages(self, x: torch.Tensor, out: torch.Tensor) -> list[Stage]:
        """Return `__call__` with `exact` as stages that map x [N, D] to `out` [N, D]."""
        return _stages([self], x, [out], exact=True)[0]

    @property
    def form(self) -> Hashable:
        """Return a key. `ExpertSlots` of this expert take all experts with an equal one."""
        return as_packed(self.gate_up).form, as_packed(self.down).form, self.swiglu


class ExpertSlots:
    """Stages that compute the experts of rows of x [N, D], with `exact`.

    Each of P slots takes an expert of the form of `expert`, and up to N rows. A pair is a row and
    an expert that it has chosen. After `arrange` and the stages, the output of pair p is row
    `places[p]` of `outputs` [P, D].
    """

    def __init__(self, expert: Expert, x: torch.Tensor, pairs: int) -> None:
        self.outputs = x.new_empty(pairs, x.shape[1])
        self._order = torch.zeros(2, pairs, dtype=torch.int64)
        x_rows, self.places = self._order
        outs = torch.split(self.outputs, 1)
        chosen = x_rows if len(x) > 1 else None
        self.stages, products = _stages([expert] * pairs, x, outs, chosen, exact=True, most=len(x))
        of_matrix, of_rows = (
            [[(step, name) for step in slot for name in names] for slot in products]
            for names in (_OF_MATRIX, _OF_ROWS)
        )
        targets = [
            [step.address(name) for step, name in (*of_slot, *of_its_rows)]
            for of_slot, of_its_rows in zip(of_matrix, of_rows, strict=True)
        ]
        numbers = torch.tensor([[step.get(name) for step, name in slot] for slot in of_rows])
        first = numbers[0]
        second = numbers[min(1, len(numbers) - 1)]
        is_count = torch.tensor([name == "tokens" for _, name in of_rows[0]]).long()
        factors = torch.stack((first - is_count, second - first, is_count), dim=1)
        self._slots = Slots(torch.tensor(targets), factors)

    def arrange(self, experts: torch.Tensor, rows: torch.Tensor, table: torch.Tensor) -> Step:
        """Return `arrange_step` of these slots. experts, rows: [P]. table: [E, n]."""
        return arrange_step(experts, rows, table, self._slots, self._order)


def compute_together(
    experts: Sequence[Expert],
    x: torch.Tensor,
    x_rows: torch.Tensor,
    outs: Sequence[torch.Tensor],
    *,
    exact: bool,
) -> None:
    """Write the output [n, D] of each expert for its rows of x [T, D].

    `x_rows` are the numbers of the rows, one expert's after another's, int64. The experts have the
    same form, and stages for x. `Expert.__call__` gives the same bits.
    """
    Program(_stages(experts, x.contiguous(), outs, x_rows, exact=exact)[0]).run()


def _stages(
    experts: Sequence[Expert],
    x: torch.Tensor,
    outs: Sequence[torch.Tensor],
    x_rows: torch.Tensor | None = None,
    *,
    exact: bool,
    most: int = 1,
) -> tuple[list[Stage], list[tuple[Step, Step]]]:
    """Return the stages of experts of one form, and the products of each.

    The arguments are as in `grouped_matmul_steps`.
    """
    ups = [as_packed(expert.gate_up).matrix for expert in experts]
    downs = [as_packed(expert.down).matrix for expert in experts]
    counts = [out.shape[0] for out in outs]
    gate_up = x.new_empty(sum(counts), ups[0].shape[0])
    gated = x.new_empty(sum(counts), ups[0].shape[0] // 2)
    gate_ups = torch.split(gate_up, counts)
    round_x, project_up = grouped_matmul_steps(x, ups, gate_ups, x_rows, exact=exact, most=most)
    round_gated, project_down = grouped_matmul_steps(gated, downs, outs, exact=exact, most=most)
    # Rounding one row takes less time than the threads need to meet.
    stages = [
        alone(*round_x) if x.shape[0] == 1 else together(*round_x),
        *(together(*steps) for steps in project_up),
        together(experts[0].swiglu.step(gate_up, gated)),
        together(*round_gated),
        *(together(*steps) for steps in project_down),
    ]
    return stages, list(zip(chain(*project_up), chain(*project_down), strict=True))


@dataclass(frozen=True)
class ExpertSpec:
    """The block of an expert. Its matrices take `nbytes`, the block takes `stride`."""

    gate_up: LinearSpec
    down: LinearSpec
    swiglu: Swiglu

    @cached_property
    def nbytes(self) -> int:
        return self.gate_up.nbytes + self.down.nbytes

    @cached_property
    def stride(self) -> int:
        """Return the bytes of the block, in whole pages."""
        return -(-self.nbytes // ALIGNMENT) * ALIGNMENT

    def tensors(self, expert: int) -> list[TensorSpec]:
        """Return the block as tensors of a safetensors file, which allows no holes."""
        specs = [
            replace(spec, name=f"{expert}.{spec.name}")
            for spec in (*self.gate_up.tensors, *self.down.tensors)
        ]
        padding = self.stride - self.nbytes
        if padding:
            specs.append(TensorSpec(f"{expert}.padding", torch.uint8, (padding,)))
        return specs

    def build(self, block: torch.Tensor) -> Expert:
        """Return the expert over a block, uint8 [stride], which is used in place."""
        gate_up, down = self._views(block)
        both = build_linear(self.gate_up, gate_up), build_linear(self.down, down)
        return Expert(*both, self.swiglu)

    def _views(self, block: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        views = []
        start = 0
        for spec in (*self.gate_up.tensors, *self.down.tensors):
            views.append(block[start : start + spec.nbytes].view(spec.dtype).view(spec.shape))
            start += spec.nbytes
        split = len(self.gate_up.tensors)
        return views[:split], views[split:]


def swiglu_of(config: ModelConfig) -> Swiglu:
    """Return the function between an expert's matrices."""
    return Swiglu(config.swiglu_limit, config.swiglu_alpha, config.hidden_act)
