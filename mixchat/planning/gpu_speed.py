"""Measures the speeds of a GPU, which hold for models of any shape."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

from mixchat.base import gpu
from mixchat.planning.bandwidth import bus_bandwidth, product_rate, room_on, seconds_of
from mixchat.planning.compute_speed import FilledTensors
from mixchat.planning.machine_speeds import INSTRUCTIONS, GPUSpeeds
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import QuantType

# Bytes of a matrix that has to come from memory, and of one whose codes take longer to decode.
# Their products take so long that a launch without a graph hides behind the one before.
_MATRIX_BYTES = 2**27
_CODES_BYTES = 2**25
_COLUMNS = 4096
_BAND = 64  # rows that any type interleaves
_CALLS = 4  # at once, so that the wait for the GPU counts little
_KERNELS = 64  # of a graph


def measure_gpu(device: torch.device) -> GPUSpeeds:
    """Return the speeds of a GPU. No model has to be there."""
    read = _matrix("int8", room_on(device, _MATRIX_BYTES))
    decoded = _matrix("trellis3", room_on(device, _CODES_BYTES))
    instructions = INSTRUCTIONS["trellis3"] * decoded.rows * decoded.columns
    kernel, round_trip = graph_seconds(device)
    speeds = GPUSpeeds(
        gpu.name(device),
        memory=read.nbytes / _seconds(read, device),
        bus=bus_bandwidth(device),
        compute=product_rate(device),
        lanes=instructions / _seconds(decoded, device),
        kernel=kernel,
        round_trip=round_trip,
    )
    gpu.release_unused(device)  # or this memory would count as taken
    return speeds


def _matrix(quant_type: QuantType, size: int) -> LinearSpec:
    """Return a matrix of about `size` bytes, with 64 rows at least."""
    band = LinearSpec("matrix", _BAND, _COLUMNS, quant_type, torch.bfloat16)
    return LinearSpec(
        "matrix", _BAND * max(size // band.nbytes, 1), _COLUMNS, quant_type, torch.bfloat16
    )


def _seconds(matrix: LinearSpec, device: torch.device) -> float:
    """Return the seconds of a product of one row."""
    multiply = _product(matrix, device)

    def multiply_often() -> None:
        for _ in range(_CALLS):
            multiply()

    return median(seconds_of(multiply_often, device)) / _CALLS


def _product(matrix: LinearSpec, device: torch.device) -> Callable[[], object]:
    """Return a function that starts a product of one row, and takes no memory."""
    # Triton is imported only if a GPU computes.
    from mixchat.kernels.gpu.product import product, split
    from mixchat.weights.matrix.gpu_linear import as_gpu

    codes = as_gpu(FilledTensors(device).linear(matrix)).matrix
    x = torch.ones(1, matrix.columns, dtype=matrix.dtype, device=device)
    out = torch.empty(split(codes.form).count, 1, matrix.rows, device=device)
    return lambda: product(x, codes, out)


def graph_seconds(device: torch.device) -> tuple[float, float]:
    """Return the seconds of a kernel in a graph that reads little, and of a round trip beside it.

    A round trip lasts from the start of a graph until the host knows that it has ended.
    """
    call = _product(_matrix("int8", 0), device)
    call()  # loading a kernel cannot be captured
    done = gpu.streams(device).Event()

    def seconds(kernels: int) -> float:
        with gpu.captured(device) as graph:
            for _ in range(kernels):
                call()

        def replay() -> None:
            graph.replay()
            done.record()
            done.synchronize()

        return median(seconds_of(replay, device))

    one, many = seconds(1), seconds(_KERNELS)
    kernel = max(many - one, 0.0) / (_KERNELS - 1) or many / _KERNELS
    return kernel, max(one - kernel, kernel)
