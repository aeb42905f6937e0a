"""The rotary position embedding of a model's layers, as config.json describes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mixchat.base.errors import CheckpointError

_MAX_FACTOR = 1000  # by which a context is stretched

RopeType = Literal[
    "default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "nope"
]


@dataclass(frozen=True)
class RopeParameters:
    """The rotary embedding of a layer, under Hugging Face's names.

    `original_max_position_embeddings` is the context in tokens that the model was first trained
    for, which all types but "default" have. Keys that a type does not take have their defaults.
    llama_4_scaling_beta: queries are multiplied by 1 + beta * ln(1 + n) after n original contexts.
    partial_rotary_factor: the part of a head's columns that is rotated. Of "proportional" it is
    the part of all pairs (i, i + head_dim / 2). They have the frequencies of whole heads. "nope"
    rotates nothing.
    """

    rope_theta: float
    rope_type: RopeType = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    llama_4_scaling_beta: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    partial_rotary_factor: float = 1.0

    @property
    def follows_length(self) -> bool:
        """Return whether the frequencies depend on the length of the sequence."""
        return self.rope_type in ("dynamic", "longrope")

    def stretched_for(self, context: int) -> int | None:
        """Return the length in tokens that the frequencies are stretched for, None if for none.

        All lengths are one to "longrope", which has two sets of frequencies.
        """
        original = self.original_max_position_embeddings
        if not self.follows_length or context <= original:
            return None
        return context if self.rope_type == "dynamic" else original + 1

    def rotated(self, head_dim: int) -> int:
        """Return how many columns of a head are rotated, which are its first.

        To "proportional" they are all, of which some turn by an angle of 0.
        """
        if self.rope_type == "proportional":
            return head_dim
        return int(head_dim * self.partial_rotary_factor)

    def check(self, head_dim: int) -> None:
        """Raise `CheckpointError` if it cannot rotate heads of this size."""
        rotated = self.rotated(head_dim)
        if rotated % 2 or not 0 < rotated <= head_dim:
            raise CheckpointError(
                f"config.json: a partial_rotary_factor of {self.partial_rotary_factor:g} cannot "
                f"rotate pairs of {head_dim} columns"
            )
        for fault in self._faults(rotated):
            raise CheckpointError(f"config.json: rope type '{self.rope_type}' {fault}")

    def _faults(self, head_dim: int) -> Iterator[str]:
        rope_type = self.rope_type
        pairs = head_dim // 2
        if not 1 <= self.factor <= _MAX_FACTOR:
            yield f"has the factor {self.factor:g}, not one from 1 to {_MAX_FACTOR}"
        if rope_type == "proportional" and not 0 < self.partial_rotary_factor <= 1:
            yield f"cannot rotate the part {self.partial_rotary_factor:g} of all pairs"
        if rope_type == "dynamic" and head_dim == 2:
            yield "needs a head_dim above 2"
        if rope_type == "yarn" and self.rope_theta <= 1:
            yield f"needs a rope_theta above 1, not {self.rope_theta:g}"
        if rope_type == "yarn" and self.beta_fast < self.beta_slow:
            yield "has a beta_fast that is smaller than its beta_slow"
        if rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            yield "needs a high_freq_factor above its low_freq_factor"
        if rope_type == "longrope" and self.original_max_position_embeddings == 1:
            yield "needs an original context above 1 token"
        if rope_type == "longrope" and {len(self.short_factor), len(self.long_factor)} != {pairs}:
            yield f"needs {pairs} numbers in short_factor and in long_factor"
