"""Starts every kernel for GPUs, so that the suite can run them on other devices."""

from __future__ import annotations

from typing import Any

import torch

from mixchat.base import gpu


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a Triton kernel on the GPU of its first tensor, in its current stream.

    grid: the counts of programs, up to three. constants: the kernel's constants, and Triton's own
    options such as `num_warps`.
    """
    device = next(item.device for item in arguments if isinstance(item, torch.Tensor))
    with gpu.current(device):
        # Triton's default, to join a product and a sum, is to change.
        start(kernel, grid, arguments, {"enable_fp_fusion": True, **constants})


def start(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Start a kernel on the current GPU."""
    kernel[grid](*arguments, **constants)
