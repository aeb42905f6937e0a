"""Random matrices, and bf16 numbers of any bits, with which the tests of types begin."""

import numpy as np
import torch
from hypothesis import strategies as st

from mixchat.weights.matrix.quant_type import BLOCKSIZE, BlockCodes, Inputs


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def random_weight(rows: int, columns: int) -> torch.Tensor:
    return random(rows, columns).bfloat16()


def there_and_back(
    kind: BlockCodes, weight: torch.Tensor, inputs: Inputs | None = None
) -> torch.Tensor:
    """Return in fp32 what the codes of a matrix stand for."""
    tensors = kind.encode(weight, torch.float32, search=True, inputs=inputs)
    return kind.dequantize(tensors, (len(weight), weight.shape[1]), torch.float32)


# Blocks of any bits, which are repeated: zeros of both signs, denormals, extremes.
any_bits = st.binary(min_size=2, max_size=400).map(
    lambda data: np.resize(np.frombuffer(data[: len(data) // 2 * 2], np.uint16), 3 * BLOCKSIZE)
)


def from_bits(bits: np.ndarray) -> torch.Tensor:
    """bf16 numbers with these 16 bits; infinities and NaNs become the largest finite ones."""
    finite = np.where(bits & 0x7F80 == 0x7F80, bits & ~np.uint16(0x0080), bits)
    return torch.from_numpy(finite.view(np.int16)).view(torch.bfloat16)


def swapped(codes: torch.Tensor) -> torch.Tensor:
    """The two halves of each byte by turns: checkpoints have the even column in the low one."""
    return codes << 4 | codes >> 4
