"""The order of a trellis' codes, which `kernels/cpu/trellis_units.py` describes.

In the order of the rows, for each band of 64 rows and each column, there is the ring in 64 bits,
then each plane. Bit r is of row r. S = stored rows, C = columns.
"""

from __future__ import annotations

import torch

from mixchat.kernels.cpu.trellis_units import COLUMNS, RING, TURNS

_FOURS = COLUMNS // 4
_ROW_WORDS = RING // 16  # of a column


def packed(codes: torch.Tensor, columns: int, planes: int) -> torch.Tensor:
    """Return the codes of some bands, uint8, in the order of the kernels."""
    count = columns // COLUMNS
    # [bands, groups of columns, four, column in it, ring or plane, j, pass]
    whole = codes.view(-1, count, _FOURS, 4, planes + 1, _ROW_WORDS, 2)
    # [..., four, pair, parity, j, byte]
    ring = whole[..., 0, :, :].reshape(-1, count, _FOURS, 2, 2, _ROW_WORDS, 2)
    ring = ring.permute(0, 1, 4, 2, 5, 3, 6).flatten(2)
    bits = whole[..., 1:, :, :].permute(0, 1, 6, 2, 5, 3, 4)  # [..., pass, four, j, column, plane]
    if planes == 1:
        return torch.cat((ring, bits.flatten(2)), dim=-1)
    turns = bits.unsqueeze(-1) >> torch.arange(TURNS, dtype=torch.uint8, device=codes.device) & 1
    pairs = turns[..., 0, :] | turns[..., 1, :] << 1  # [..., pass, four, j, column, turn]
    # A byte holds the two bits of four turns: 0 to 3 in the first vectors, 4 to 7 in the second.
    fours = pairs.view(*pairs.shape[:-1], 2, 4)
    joined = fours[..., 0] | fours[..., 1] << 2 | fours[..., 2] << 4 | fours[..., 3] << 6
    return torch.cat((ring, joined.movedim(-1, -4).flatten(2)), dim=-1)


def unpacked(codes: torch.Tensor, columns: int, planes: int) -> torch.Tensor:
    """Undo `packed`. Return [bands, C / 16, 4, 4, ring or plane, 4, 2]."""
    count = columns // COLUMNS
    groups = codes.view(-1, count, (planes + 1) * RING * COLUMNS // 8)
    size = RING * COLUMNS // 8
    ring = groups[..., :size].reshape(-1, count, 2, _FOURS, _ROW_WORDS, 2, 2)
    ring = ring.permute(0, 1, 3, 5, 2, 4, 6).flatten(3, 4).unsqueeze(4)
    if planes == 1:
        bits = groups[..., size:].reshape(-1, count, 2, _FOURS, _ROW_WORDS, 4, 1)
    else:
        # Bytes of four turns become pairs of bits, and these a byte of eight turns for each plane.
        fours = groups[..., size:].reshape(-1, count, 2, 2, _FOURS, _ROW_WORDS, 4)
        shifts = torch.arange(TURNS, dtype=torch.uint8, device=codes.device)
        pairs = fours.movedim(3, -1).unsqueeze(-1) >> shifts[:4] * 2 & 3  # [..., column, 2, 4]
        turns = pairs.flatten(-2)
        by_plane = [((turns >> plane & 1) << shifts).sum(-1, dtype=torch.uint8) for plane in (0, 1)]
        bits = torch.stack(by_plane, dim=-1)
    bits = bits.permute(0, 1, 3, 5, 6, 4, 2)
    return torch.cat((ring, bits), dim=4)


def packed_scales(scales: torch.Tensor) -> torch.Tensor:
    """Return scales [bands, 64, n] as [bands, n, 64], in the kernel's order of the rows."""
    bands, _, blocks = scales.shape
    # [band, j, turn of both passes, block]
    return scales.view(bands, _ROW_WORDS, 16, blocks).permute(0, 3, 2, 1).flatten(2)


def unpacked_scales(scales: torch.Tensor) -> torch.Tensor:
    """Undo `packed_scales`."""
    bands, blocks, _ = scales.shape
    return scales.view(bands, blocks, 16, _ROW_WORDS).permute(0, 3, 2, 1).flatten(1, 2)
