"""The name of an expert."""

from __future__ import annotations

from typing import NamedTuple


class ExpertKey(NamedTuple):
    """Names one expert of one layer."""

    layer: int
    expert: int
