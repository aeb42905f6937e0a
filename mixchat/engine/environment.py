"""Sets the environment that torch reads when it is imported, and imports it."""

from __future__ import annotations

import os
import sys

from mixchat.base import interrupts, machine
from mixchat.base.errors import ResourceError
from mixchat.base.quantities import format_least, format_size

# With less, native code ends the process while torch or a tokenizer is imported.
_MIN_ADDRESS_SPACE_BYTES = 950_000_000


def prepare_environment() -> None:
    """Set variables that torch reads, unless they are set, and import it.

    Raises `ResourceError` if a `ulimit` leaves too little memory for it.
    """
    # With large pages for large tensors, reading the weights of an expert is 5 to 8% faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # By default OpenMP's idle threads keep spinning. If a core is busy, decoding then loses three
    # quarters of its speed.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if "torch" in sys.modules:
        return
    free = machine.memory_left_by_ulimit().get("ulimit -v")
    if free is not None and free < _MIN_ADDRESS_SPACE_BYTES:
        raise ResourceError(
            f"not enough memory: {format_least(_MIN_ADDRESS_SPACE_BYTES)} needed, "
            f"ulimit -v leaves {format_size(free)}",
            hint="Raise that limit.",
        )
    with interrupts.starting():
        import torch  # noqa: F401
