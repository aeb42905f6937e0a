"""Waits for what has to come. A machine that stands still for seconds fails no test."""

from __future__ import annotations

import time
from collections.abc import Callable

# Seconds after which a test fails instead of hanging. pytest's own limit is twice as long.
PATIENCE_S = 300


def wait_until(holds: Callable[[], object]) -> None:
    """Return as soon as something holds."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)
