"""Speed and error of the NF4 coder of the CPU beside bitsandbytes'.

    python tests/benchmarks/quantize.py [ROWS COLUMNS]           (14336 4096, a matrix of Mixtral)

Each repeat runs every coder once, so that other work on the machine falls on all of them; the table
gives medians over the repeats. The error is ||W - Q|| / ||W|| on normally distributed weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch

from mixchat.weights.matrix.nf4 import NF4
from mixchat.weights.matrix.quant_type import BLOCKSIZE

REPEATS = 5
BITSANDBYTES_PIECE = 2**23  # weights; it takes some 18 bytes of temporary memory for each

Coded = tuple[torch.Tensor, torch.Tensor]


def by_bitsandbytes(weight: torch.Tensor) -> Coded:
    pieces = [
        bnb.quantize_4bit(piece, blocksize=BLOCKSIZE, quant_type="nf4")
        for piece in weight.view(-1).split(BITSANDBYTES_PIECE)
    ]
    codes = torch.cat([codes.view(-1) for codes, _ in pieces])
    return codes, torch.cat([state.absmax for _, state in pieces]).to(torch.bfloat16)


CODERS: dict[str, Callable[[torch.Tensor], Coded]] = {
    "bitsandbytes": by_bitsandbytes,
    "absmax": NF4.codes,
    "search": lambda weight: NF4.codes(weight, search=True),
}


def relative_error(weight: torch.Tensor, coded: Coded) -> float:
    """Over the first rows only, which are enough for three digits."""
    rows = weight[:512]
    codes = coded[0][: rows.numel() // 2]
    levels = NF4.levels[torch.stack((codes >> 4, codes & 0xF), dim=-1).int()].view(-1, BLOCKSIZE)
    decoded = levels * coded[1][: len(levels)].float().unsqueeze(-1)
    return ((decoded.view_as(rows) - rows.float()).norm() / rows.float().norm()).item()


def seconds(coder: Callable[[torch.Tensor], Coded], weight: torch.Tensor) -> float:
    start = time.perf_counter()
    coder(weight)
    return time.perf_counter() - start


def main(rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    errors = {name: relative_error(weight, coder(weight)) for name, coder in CODERS.items()}
    times: dict[str, list[float]] = {name: [] for name in CODERS}
    for _ in range(REPEATS):
        for name, coder in CODERS.items():
            times[name].append(seconds(coder, weight))
    speeds = {n: weight.numel() / statistics.median(t) / 1e6 for n, t in times.items()}
    print(f"{rows} x {columns} bf16, {torch.get_num_threads()} threads, {REPEATS} repeats")
    print(f"{'':14}{'M weights/s':>12}{'ratio':>8}{'error':>9}")
    for name, speed in speeds.items():
        ratio = speed / speeds["bitsandbytes"]
        print(f"{name:14}{speed:12.0f}{ratio:8.1f}{errors[name]:9.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", type=int, nargs="?", default=14336)
    parser.add_argument("columns", type=int, nargs="?", default=4096)
    main(**vars(parser.parse_args()))
