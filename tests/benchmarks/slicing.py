"""Each expert sliced over machines (tensor parallelism) against whole experts: a layer's time.

    python tests/benchmarks/slicing.py

It measures an expert of Mixtral's shapes and its slices with one thread of this machine, and
computes from that what a layer's experts take on 2, 3 and 4 machines. The first one chats; a link
of 1 Gb/s, on which it sends and receives one row after the other, joins it with the others. The
router is even. A copy is one more expert in each layer, on each machine. On one core (AVX512, 23
GB/s), where an expert takes 4.09 ms, its half 2.03, a third 1.38 and a quarter 1.06:

    one token, ms               whole   1 copy   2 copies   slices      one machine: 8.19
    2 machines, 0.05 ms          6.00     5.14       4.56     4.31
    2 machines, 0.2 ms           6.12     5.27       4.71     4.46
    2 machines, 1 ms             6.75     5.99       5.48     5.26
    3 machines, 0.2 ms           5.43     4.72       4.43     3.35
    4 machines, 0.2 ms           5.03     4.45       4.44     2.90

    512 tokens       whole: ms   MB out, in   slices: ms   MB out, in   one machine: 1032 ms
    2 machines             516     4.2, 4.2          554     4.2, 8.4
    3 machines             387     5.2, 5.2          334    8.4, 16.8
    4 machines             258     6.3, 6.3          264   12.6, 25.2

Decision: whole experts. Slices are quicker for one token, since no machine waits for another: with
2 machines by 27%, which two copies a layer reduce to 5%, with 3 and 4 by 38 and 42%. But their
partial sums round otherwise than a whole product, and otherwise with each count of machines, so
that an answer would change when a worker is lost or comes back; whole experts are the same to the
bit everywhere. A prompt gains nothing with 2 or 4 machines, and sends and receives 1.5 to 3 times
as many bytes: at 1 Gb/s nearly as long as 4 machines compute. With 3 machines it would gain 14%, as
eight experts make uneven shares (3, 3, 2); their memory is even all the same, as another one has
two in the next layer. A machine with less memory, or slower, holds fewer whole experts; slices
would need widths for each set of machines, whole scales in each, and packed codes rewritten. And
each slice is needed for each token: the slowest machine sets the pace of all, and one that is lost
takes a part of every expert with it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from statistics import mean

from network import start

from mixchat.engine.environment import prepare_environment

EXPERTS, CHOSEN, HIDDEN, INNER = 8, 2, 4096, 14336
BLOCK = 64  # weights that share a scale, which no slice cuts
HOLDERS = (2, 3, 4)
ROUND_TRIPS = (0.00005, 0.0002, 0.001)  # seconds
ROW = 2 * HIDDEN  # bytes
RATE = 1e9 / 8  # bytes a second
PROMPT = 512  # tokens
ROUNDS = 5  # the quickest counts, for other programs only slow it down


@dataclass(frozen=True)
class Timing:
    """Seconds of an expert for one row: `alone`, and `beside` a core that computes one as well."""

    alone: float
    beside: float


def expert_timing() -> Timing:
    """Measure an expert with one thread, on one core and on two at once."""
    alone, beside = slice_seconds(1, [0]), slice_seconds(1, [0, 1])
    return Timing(alone[0][1], mean(seconds[1] for seconds in beside))


def slice_seconds(holders: int, cores: Sequence[int]) -> list[dict[int, float]]:
    """Return seconds by count of rows of the largest slice of an expert, for a process a core."""
    inner = BLOCK * math.ceil(INNER / BLOCK / holders)
    command = [sys.executable, __file__, "--inner", str(inner)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        start(["taskset", "-c", str(core), *command], stdout=subprocess.PIPE, env=environment)
        for core in cores
    ]
    answers = [process.communicate()[0] for process in processes]
    return [{int(rows): took for rows, took in json.loads(answer).items()} for answer in answers]


def measure(inner: int) -> dict[int, float]:
    """Return seconds of an expert whose inner size is this, by count of rows.

    A slice is one: 1/n of the rows of w1 and w3, and the columns of w2 that take their products.
    """
    prepare_environment()
    import torch

    from mixchat.experts.memory import CPU
    from mixchat.planning.compute_speed import Effort, ExpertTimer
    from mixchat.weights.families.read_config import read_config
    from mixchat.weights.format.blueprint import Blueprint, Quantization
    from mixchat.weights.known_models import MIXTRAL

    config = read_config({**MIXTRAL, "intermediate_size": inner})
    with torch.inference_mode():
        return ExpertTimer(Blueprint(config, Quantization()), CPU, Effort(seconds=1)).seconds()


def decode_whole(holders: int, spare: int, expert: float, round_trip: float) -> float:
    """Return the mean seconds of a layer with whole experts, over all pairs that a router chooses.

    Each machine holds its share and `spare` experts of the others', and of all ways to share out a
    pair the quickest is taken.
    """
    held = list(_held(holders, spare))
    return mean(
        min(
            _seconds(where, expert, round_trip)
            for where in product(*([n for n in range(holders) if e in held[n]] for e in pair))
        )
        for pair in combinations(range(EXPERTS), CHOSEN)
    )


def _held(holders: int, spare: int) -> Iterator[set[int]]:
    """Yield the experts of each machine: an even share, and the first `spare` ones of others."""
    owners = [expert % holders for expert in range(EXPERTS)]
    for holder in range(holders):
        own = {expert for expert in range(EXPERTS) if owners[expert] == holder}
        others = [expert for expert in range(EXPERTS) if owners[expert] != holder]
        yield own | {others[(holder * spare + n) % len(others)] for n in range(spare)}


def _seconds(where: Sequence[int], expert: float, round_trip: float) -> float:
    """Return when the last of these machines is done: each takes a row, and gives one an expert."""
    done = [where.count(0) * expert]
    for sent, holder in enumerate(sorted({n for n in where if n}), 1):
        count = where.count(holder)
        done.append(round_trip + (sent + count) * ROW / RATE + count * expert)
    return max(done)


def decode_sliced(holders: int, part: float, round_trip: float) -> float:
    """Return the seconds of a layer with slices: all machines take the row and return fp32 sums."""
    return CHOSEN * part + round_trip + 3 * (holders - 1) * ROW / RATE


def decode_table(seconds: dict[int, float]) -> Iterator[str]:
    """Yield the milliseconds of a layer's experts for one token, by holders and round trip."""
    yield f"one machine: {CHOSEN * seconds[1] * 1e3:.2f} ms"
    yield "holders, round trip (ms)   whole   +1 copy  +2 copies  slices"
    for holders, round_trip in product(HOLDERS, ROUND_TRIPS):
        whole = [decode_whole(holders, spare, seconds[1], round_trip) for spare in (0, 1, 2)]
        taken = [*whole, decode_sliced(holders, seconds[holders], round_trip)]
        figures = "".join(f"{1e3 * one:9.2f}" for one in taken)
        yield f"{holders}, {round_trip * 1e3:<22g}{figures}"


def prompt_table(seconds: dict[int, float]) -> Iterator[str]:
    """Yield a layer's experts for a prompt: the slowest holder's computing, the chat side's bytes.

    seconds: of a slice, by count of holders, for the rows that an expert gets of the prompt.
    """
    yield f"one machine: {EXPERTS * seconds[1] * 1e3:.0f} ms"
    yield "holders   whole: ms   MB out, in   slices: ms   MB out, in"
    for holders in HOLDERS:
        share = math.ceil(EXPERTS / holders)
        whole = CHOSEN * PROMPT * (1 - share / EXPERTS) * ROW / 1e6
        sliced = (holders - 1) * PROMPT * ROW / 1e6
        yield (
            f"{holders}{1e3 * share * seconds[1]:17.0f}{whole:9.1f}, {whole:.1f}"
            f"{1e3 * EXPERTS * seconds[holders]:12.0f}{sliced:10.1f}, {2 * sliced:.1f}"
        )


def main() -> None:
    from mixchat.planning.machine_speeds import interpolate

    parts = (1, *HOLDERS)
    rounds = [{part: slice_seconds(part, [0])[0] for part in parts} for _ in range(ROUNDS)]
    rows = CHOSEN * PROMPT / EXPERTS
    decode = {part: min(found[part][1] for found in rounds) for part in parts}
    prompt = {part: min(interpolate(found[part], rows) for found in rounds) for part in parts}
    for part in parts:
        print(f"1/{part} of an expert: {decode[part] * 1e3:.2f} ms, {rows:.0f} rows", end=" ")
        print(f"{prompt[part] * 1e3:.0f} ms")
    print("\n".join(["", "A token", *decode_table(decode)]))
    print("\n".join(["", f"A prompt of {PROMPT} tokens", *prompt_table(prompt)]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inner", type=int, help="measure an expert of this inner size, alone")
    inner = parser.parse_args().inner
    if inner is None:
        main()
    else:
        print(json.dumps(measure(inner)))
