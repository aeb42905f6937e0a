"""The published figures of common GPUs by their names, and the search for a name.

The figures come from NVIDIA's and AMD's data sheets and architecture white papers, the compute
capabilities those of developer.nvidia.com/cuda-gpus. Real cards differ by some percent, and a
laptop's compute rate by its power limit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache

from mixchat.base.errors import UsageError
from mixchat.base.quantities import parse_size

# Of NVIDIA's cards. Triton's and bitsandbytes' code begins with Turing.
_MIN_CAPABILITY = (7, 5)
_GIB = 2**30
_NEAREST = 4  # names that an error gives
_LONGEST = 60  # characters of a name
_MOST_CARDS = 16  # of a machine

# Bytes a second of a PCI Express slot after its encoding, by generation and lanes, in GB/s.
_PCIE = {"3x8": 7.9, "3x16": 15.8, "4x8": 15.8, "4x16": 31.5, "5x8": 31.5, "5x16": 63.0}

# Operations in fp32 for each thread that a card can run an instruction of, 2 for others of NVIDIA
# and 4 for others of AMD. Turing and GA100 issue for 128 threads a clock, and have 64 fp32 units.
_FP32_PER_LANE = {"7.5": 1, "8.0": 1, "gfx90a": 2}

# Name, GiB of memory, GB/s of memory, PCI Express, compute capability (of AMD the architecture),
# TFLOP/s of 16-bit matrix products with sums in fp32, without sparsity, 0 without such units, and
# TFLOP/s in fp32. If a name has several sizes, the first one is the usual one.
_CARDS = """
GTX 1060               6   192   3x16  6.1        0    4.4
GTX 1070               8   256   3x16  6.1        0    6.5
GTX 1080               8   320   3x16  6.1        0    8.9
GTX 1080 Ti           11   484   3x16  6.1        0   11.3
GTX 1650               4   128   3x16  7.5        6      3
GTX 1650 SUPER         4   192   3x16  7.5        9    4.4
GTX 1660               6   192   3x16  7.5       10      5
GTX 1660 SUPER         6   336   3x16  7.5       10      5
GTX 1660 Ti            6   288   3x16  7.5       11    5.4
RTX 2060               6   336   3x16  7.5       26    6.5
RTX 2060 12GB         12   336   3x16  7.5       29    7.2
RTX 2060 SUPER         8   448   3x16  7.5       29    7.2
RTX 2070               8   448   3x16  7.5       30    7.5
RTX 2070 SUPER         8   448   3x16  7.5       36    9.1
RTX 2080               8   448   3x16  7.5       40   10.1
RTX 2080 SUPER         8   496   3x16  7.5       45   11.2
RTX 2080 Ti           11   616   3x16  7.5       54   13.4
TITAN RTX             24   672   3x16  7.5      130   16.3
RTX 3050               8   224   4x8   8.6       18      9
RTX 3050 6GB           6   168   4x8   8.6       14      7
RTX 3060              12   360   4x16  8.6       25   12.5
RTX 3060 8GB           8   240   4x16  8.6       25   12.5
RTX 3060 Ti            8   448   4x16  8.6       32     16
RTX 3070               8   448   4x16  8.6       41   20.5
RTX 3070 Ti            8   608   4x16  8.6       43   21.5
RTX 3080              10   760   4x16  8.6       60     30
RTX 3080 12GB         12   912   4x16  8.6       61   30.5
RTX 3080 Ti           12   912   4x16  8.6       68     34
RTX 3090              24   936   4x16  8.6       71   35.5
RTX 3090 Ti           24  1008   4x16  8.6       80     40
RTX 4060               8   272   4x8   8.9       30     15
RTX 4060 Ti            8   288   4x8   8.9       44     22
RTX 4060 Ti 16GB      16   288   4x8   8.9       44     22
RTX 4070              12   504   4x16  8.9       58     29
RTX 4070 SUPER        12   504   4x16  8.9       71   35.5
RTX 4070 Ti           12   504   4x16  8.9       80     40
RTX 4070 Ti SUPER     16   672   4x16  8.9       88     44
RTX 4080              16   717   4x16  8.9       97   48.5
RTX 4080 SUPER        16   736   4x16  8.9      104     52
RTX 4090              24  1008   4x16  8.9      165   82.5
RTX 5050               8   320   5x8   12.0      26     13
RTX 5060               8   448   5x8   12.0      38     19
RTX 5060 Ti           16   448   5x8   12.0      47   23.5
RTX 5060 Ti 8GB        8   448   5x8   12.0      47   23.5
RTX 5070              12   672   5x16  12.0      62     31
RTX 5070 Ti           16   896   5x16  12.0      88     44
RTX 5080              16   960   5x16  12.0     113   56.5
RTX 5090              32  1792   5x16  12.0     210    105
RTX 2060 Laptop        6   336   3x16  7.5       18    4.6
RTX 2070 Laptop        8   448   3x16  7.5       26    6.6
RTX 2080 Laptop        8   384   3x16  7.5       37    9.4
RTX 3050 Laptop        4   192   4x8   8.6       14      7
RTX 3050 Ti Laptop     4   192   4x8   8.6       17    8.5
RTX 3060 Laptop        6   336   4x16  8.6       22     11
RTX 3070 Laptop        8   448   4x16  8.6       32     16
RTX 3070 Ti Laptop     8   448   4x16  8.6       33   16.5
RTX 3080 Laptop        8   448   4x16  8.6       38     19
RTX 3080 16GB Laptop  16   448   4x16  8.6       38     19
RTX 3080 Ti Laptop    16   512   4x16  8.6       47   23.5
RTX 4050 Laptop        6   192   4x8   8.9       18      9
RTX 4060 Laptop        8   256   4x8   8.9       23   11.5
RTX 4070 Laptop        8   256   4x8   8.9       31   15.5
RTX 4080 Laptop       12   432   4x16  8.9       49   24.5
RTX 4090 Laptop       16   576   4x16  8.9       66     33
RTX 5060 Laptop        8   384   5x8   12.0      26     13
RTX 5070 Laptop        8   384   5x8   12.0      36     18
RTX 5070 Ti Laptop    12   672   5x16  12.0      47   23.5
RTX 5080 Laptop       16   896   5x16  12.0      55   27.5
RTX 5090 Laptop       24   896   5x16  12.0      64     32
P40                   24   346   3x16  6.1        0   11.8
P100                  16   732   3x16  6.0        0    9.3
V100                  16   900   3x16  7.0      112     14
V100 32GB             32   900   3x16  7.0      112     14
T4                    16   320   3x16  7.5       65    8.1
A2                    16   200   4x8   8.6       18    4.5
A10                   24   600   4x16  8.6      125   31.2
A10G                  24   600   4x16  8.6       70   31.2
A30                   24   933   4x16  8.0      165   10.3
A40                   48   696   4x16  8.6      150   37.4
A100                  40  1555   4x16  8.0      312   19.5
A100 80GB             80  1935   4x16  8.0      312   19.5
L4                    24   300   4x16  8.9      121   30.3
L40                   48   864   4x16  8.9      181   90.5
L40S                  48   864   4x16  8.9      362   91.6
H100                  80  3350   5x16  9.0      989   66.9
H100 PCIe             80  2000   5x16  9.0      756   51.2
H100 NVL              94  3900   5x16  9.0      835   60.3
H200                 141  4800   5x16  9.0      989   66.9
B200                 180  8000   5x16  10.0    2250     75
Quadro RTX 4000        8   416   3x16  7.5       57    7.1
Quadro RTX 5000       16   448   3x16  7.5       89   11.2
Quadro RTX 6000       24   672   3x16  7.5      130   16.3
Quadro RTX 8000       48   672   3x16  7.5      130   16.3
RTX A2000              6   288   4x16  8.6       32      8
RTX A2000 12GB        12   288   4x16  8.6       32      8
RTX A4000             16   448   4x16  8.6       77   19.2
RTX A4500             20   640   4x16  8.6       95   23.7
RTX A5000             24   768   4x16  8.6      111   27.8
RTX A5500             24   768   4x16  8.6      136   34.1
RTX A6000             48   768   4x16  8.6      155   38.7
RTX 2000 Ada          16   224   4x8   8.9       48     12
RTX 4000 Ada          20   360   4x16  8.9      107   26.7
RTX 4500 Ada          24   432   4x16  8.9      159   39.6
RTX 5000 Ada          32   576   4x16  8.9      261   65.3
RTX 6000 Ada          48   960   4x16  8.9      364   91.1
RTX PRO 4000          24   672   5x16  12.0     187   46.9
RTX PRO 4500          32   896   5x16  12.0     219   54.9
RTX PRO 5000          48  1344   5x16  12.0     294   73.7
RTX PRO 6000          96  1792   5x16  12.0     504    126
RX 7600 XT            16   288   4x8   gfx1102   45   22.6
RX 7700 XT            12   432   4x16  gfx1101   70   35.2
RX 7800 XT            16   624   4x16  gfx1101   75   37.3
RX 7900 GRE           16   576   4x16  gfx1100   92     46
RX 7900 XT            20   800   4x16  gfx1100  103   51.5
RX 7900 XTX           24   960   4x16  gfx1100  123   61.4
PRO W7900             48   864   4x16  gfx1100  123   61.3
RX 9060 XT            16   320   5x16  gfx1200  103   25.6
RX 9070               16   640   5x16  gfx1201  145   36.1
RX 9070 XT            16   640   5x16  gfx1201  195   48.7
MI210                 64  1638   4x16  gfx90a   181   22.6
MI300X               192  5300   5x16  gfx942  1307  163.4
"""
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
        return cls(_UNKNOWN, memory, 3e11, _PCIE["3x16"] * 1e9, 4e13, 8e12, (8, 6), is_known=False)


def too_old(capability: tuple[int, int] | None) -> str | None:
    """Return why a GPU of this compute capability cannot be used, as the end of a sentence."""
    if capability is None or capability >= _MIN_CAPABILITY:
        return None
    has, needs = (".".join(map(str, version)) for version in (capability, _MIN_CAPABILITY))
    return f"compute capability {has}, and {needs} is needed (GTX 16, RTX 20 or later)"


@cache
def cards() -> tuple[Card, ...]:
    """Return all cards."""
    table = []
    for line in _CARDS.strip().splitlines():
        *words, memory, bandwidth, pcie, version, compute, fp32 = line.split()
        major, _, minor = version.partition(".")
        table.append(
            Card(
                " ".join(words),
                int(memory) * _GIB,
                float(bandwidth) * 1e9,
                _PCIE[pcie] * 1e9,
                float(compute) * 1e12,
                float(fp32) * 1e12 / _FP32_PER_LANE.get(version, 2 if minor else 4),
                (int(major), int(minor)) if minor else None,
            )
        )
    return tuple(table)


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
