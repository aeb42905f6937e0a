"""The choice of checkpoints, the lengths to which the states of a sequence can be cut back.

A state cannot be cut, so a text that differs from the one before is computed again from the last
checkpoint before the difference.
"""

from __future__ import annotations

from collections.abc import Collection

# The bytes of the checkpoints of all sequences, if little memory is free and if much is. A state of
# Qwen3.6 takes 66 MB, so one sequence has 8 to 64 of them.
_USUAL_BYTES = 2**29
_MOST_BYTES = 2**32
# Where a turn begins, its question ends, and near that. /undo, /regen and the next turn go there.
TURN_ENDS = 3
_MIN_CHECKPOINTS = TURN_ENDS + 1
_MORE_CHECKPOINTS = (16, 32, 64)
_MIN_SPACING = 512  # tokens
_MAX_SPACINGS = 64  # in a full context


def checkpoint_counts(state_bytes: int, count: int) -> tuple[int, ...]:
    """Return how many checkpoints each of `count` sequences may have, the usual count first.

    The usual ones are made however little memory is free. The other counts are few and far apart,
    so that a little more or less free memory gives the same count.

    state_bytes: of a checkpoint, 0 for a model without states.
    """
    if not state_bytes:
        return (0,)
    fitting = _USUAL_BYTES // count // state_bytes
    usual = min(max(fitting, _MIN_CHECKPOINTS), _MORE_CHECKPOINTS[-1])
    most = _MOST_BYTES // count // state_bytes
    return (usual, *(more for more in _MORE_CHECKPOINTS if usual < more <= most))


def spacing_of(capacity: int) -> int:
    """Return the tokens between checkpoints inside a turn, before any is forgotten."""
    return max(_MIN_SPACING, -(-capacity // _MAX_SPACINGS))


def kept_checkpoints(
    checkpoints: Collection[int],
    length: int,
    limit: int,
    spacing: int,
    *,
    latest: Collection[int] = (),
    turns: Collection[int] = (),
) -> list[int]:
    """Return the `limit` checkpoints, in order, of a text of `length` tokens that help most.

    latest: ends of the last turn, which stay. turns: ends of other turns, which are preferred.

    The gap of a checkpoint reaches from the one before to the one after, or to the next possible
    one. It is measured in the tokens from its beginning to the text's end, because the end of a
    text is changed most often. The checkpoint with the smallest gap goes. Those inside turns go
    first, until a gap would be larger than 1/2, or 8 / limit if that is less.

    Take checkpoints at 1,000, 2,000, and so on to 16,000 tokens, the length of the text, of which 6
    may stay. The last turn has those at 15,000 and 16,000. With a spacing of 1,000, these stay:
    4,000, 8,000, 12,000, 14,000, 15,000, 16,000. So a change after 13,500 tokens computes 1,500
    tokens again, and a change after 7,500 tokens 3,500.

    Let m checkpoints be outside the last turn as one has to go. Then no new gap is larger than the
    1/2 or 8 / limit, or than 1 - (spacing / (length + spacing)) ** (1 / (m // 2)) if that is more.
    With 3 ends of the last turn and 64 spacings, the second is 0.75 for a limit of 8, 0.45 for 16,
    0.24 for 32 and 0.13 for 64. With fewer than 8, a gap may be as large as the text.
    """
    largest_gap = min(1 / 2, 8 / max(limit, 1))  # without one of those inside turns
    kept = sorted(checkpoints)
    while len(kept) > limit:
        neighbors = zip([0, *kept], kept, [*kept[1:], length + spacing], strict=False)
        gaps = {n: (after - before) / (length + spacing - before) for before, n, after in neighbors}
        removable = [n for n in kept if n not in latest] or kept[:1]
        inside = [n for n in removable if n not in turns and gaps[n] <= largest_gap]
        kept.remove(min(inside or removable, key=gaps.__getitem__))
    return kept
