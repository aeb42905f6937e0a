"""Finds a GPU by name in cards.json, which has the published figures of cards.

The figures come from NVIDIA's and AMD's data sheets and architecture white papers, and the compute
capabilities from developer.nvidia.com/cuda-gpus. Real cards differ by some percent. A laptop's
compute rate also depends on its power limit. `bus` is the rate of a PCI Express slot after its
encoding. `compute` is the rate without sparsity, and 0 for cards without units for matrices.
`lanes` of Turing and GA100 counts 128 threads a clock, although a processor has only 64 fp32 units.
If a name stands for cards of several sizes, the usual size comes first.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from mixchat.base.errors import UsageError
from mixchat.base.quantities import parse_size

# Of NVIDIA's cards. Triton's and bitsandbytes' code begins with Turing.
_MIN_CAPABILITY = (7, 5)
_GIB = 2**30
_NEAREST = 4  # names that an error gives
_LONGEST = 60  # characters of a name
_MOST_CARDS = 16  # of a machine

# The words that people and drivers write around a name, and the size that may end it.
_NOISE = re.compile(
    r"\b(nvidia|geforce|amd|radeon|instinct|tesla|gpu|graphics|generation|blackwell|workstation"
    r"|server|edition|tensor core|max q|hbm[23]e?|sxm[0-9]?|(?<=a100 )pcie)\b"
    r"|\((r|tm)\)|[\u00ae\u2122]"
)
_SIZE = re.compile(r"\b([0-9]{1,3}) ?gb\b")
_AMOUNT = re.compile(r"[0-9.]+\s*([KMGT]?I?B?|%)", re.IGNORECASE)  # of memory
_UNKNOWN = "a GPU"
_SERIES = ("", "rtx", "gtx", "rx")  # which people leave out
_COUNT = re.compile(r"\s*([0-9]{1,2})\s*[x*\u00d7]\s*(\S.*)", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """The figures of a card.

    memory: bytes. bandwidth: bytes a second of its memory. bus: bytes a second from RAM. compute:
    floating-point operations a second of 16-bit matrix products. lanes: instructions a second of
    single threads. capability: of CUDA, None for a card of AMD. is_known: false for a GPU of which
    only the memory is known.
    """

    name: str
    memory: int
    bandwidth: float
    bus: float
    compute: float
    lanes: float
    capability: tuple[int, int] | None = None
    is_known: bool = True

    @classmethod
    def of_size(cls, memory: int) -> Card:
        """Return a cheap card with this memory, which stands for an unknown one."""
        return cls(_UNKNOWN, memory, 3e11, 15.8e9, 4e13, 8e12, (8, 6), is_known=False)


def too_old(capability: tuple[int, int] | None) -> str | None:
    """Return why a GPU of this compute capability cannot be used, as the end of a sentence."""
    if capability is None or capability >= _MIN_CAPABILITY:
        return None
    has, needs = (".".join(map(str, version)) for version in (capability, _MIN_CAPABILITY))
    return f"compute capability {has}, and {needs} is needed (GTX 16, RTX 20 or later)"


@cache
def cards() -> tuple[Card, ...]:
    """Return all cards."""
    rows = json.loads(Path(__file__).with_name("cards.json").read_bytes())
    return tuple(Card(**{**row, "capability": _version(row.get("capability"))}) for row in rows)


def _version(numbers: list[int] | None) -> tuple[int, int] | None:
    return None if numbers is None else (numbers[0], numbers[1])


def find_card(name: str, memory: int | None = None) -> Card | None:
    """Return the card with a name as a person or a driver writes it, None if it is unknown.

    Of cards with the same name, the one with about `memory` bytes is returned.
    """
    text, size = _plain(name)
    memory = size if memory is None else memory
    for series in _SERIES:
        named = [card for card in cards() if _plain(card.name)[0] == series + text]
        if memory is not None:
            named = [card for card in named if abs(card.memory - memory) < 0.1 * card.memory]
        if named:
            return named[0]
    return None


def parse_cards(text: str) -> tuple[Card, ...]:
    """Return the GPUs that `24GB`, `RTX 4060`, `2x RTX 3090` or `12GB, RTX 3060` name.

    Raises `UsageError` if a name is unknown, with the nearest ones, or if a card is too old.
    """
    named: list[Card] = []
    for item in text.split(","):
        match = _COUNT.fullmatch(item)
        count, name = (int(match[1]), match[2]) if match else (1, item)
        if not 1 <= len(named) + count <= _MOST_CARDS:
            raise UsageError(f"a machine has 1 to {_MOST_CARDS} GPUs, not {len(named) + count}")
        name = name.strip()
        card = find_card(name)
        if card is None and _AMOUNT.fullmatch(name):
            card = Card.of_size(parse_size(name))
        if card is None:
            known = {_plain(card.name)[0]: card.name for card in reversed(cards())}
            near = get_close_matches(_plain(name)[0], known, _NEAREST, cutoff=0.5)
            names = f"The nearest: {', '.join(known[key] for key in near)}. " if near else ""
            hint = f"{names}A size works, too: 24GB."
            raise UsageError(f"no card is known as {name[:_LONGEST]!r}", hint=hint)
        if problem := too_old(card.capability):
            raise UsageError(f"{card.name} cannot be used: {problem}")
        named += [card] * count
    return tuple(named)


@cache
def _plain(name: str) -> tuple[str, int | None]:
    """Return a name without case, spaces, makers and size, and the size in bytes."""
    text = _NOISE.sub(" ", name[:_LONGEST].lower().replace("-", " "))
    size = _SIZE.search(text)
    text = re.sub(r"\s+", "", _SIZE.sub(" ", text))
    return text, int(size[1]) * _GIB if size else None
