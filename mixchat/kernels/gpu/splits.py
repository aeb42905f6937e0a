"""Counts the scratch of a token's attention for plans. It does not import Triton."""

from __future__ import annotations

# Twice the processors of the largest cards. Each then has something to load while another computes.
PROGRAMS = 256
LATENT_ROWS, MOST_WIDTH = 16, 256  # of a program, if rows are wider than most models' heads


def token_scratch(heads: int, groups: int, width: int) -> int:
    """Return the numbers in fp32 that attention of one token needs for its splits, at most.

    At most `PROGRAMS` programs have some heads of a group each. They leave a sum [width] for each
    head, the largest score and the sum of the weights.
    """
    rows = heads // groups
    return PROGRAMS * (min(rows, LATENT_ROWS) if width > MOST_WIDTH else rows) * (width + 2)
