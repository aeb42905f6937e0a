"""Decode speed on Mixtral's real layer shapes against the memory's read bandwidth, in one run.

    python tests/benchmarks/decode.py [LAYERS] [ROUNDS]          (4 layers, 9 rounds)

Each round measures the bandwidth (the sum of 1 GB of floats, the best of five), then the 4-bit
kernel alone (every expert's matrices, one behind the other), and then decodes 48 tokens, so that
all see the machine in the same state. Bytes a token: the matrices that decoding one token reads,
which is attention, two experts a layer, and the head.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from mixchat.engine.environment import prepare_environment

prepare_environment()

import torch  # noqa: E402
from synthetic import write_synthetic  # noqa: E402

from mixchat.engine.generate import Engine  # noqa: E402
from mixchat.engine.loader import LoadOptions, load_engine  # noqa: E402
from mixchat.engine.sampling import SamplingOptions  # noqa: E402
from mixchat.weights.blueprint import Blueprint  # noqa: E402
from mixchat.weights.checkpoint import KeptModel  # noqa: E402

TOKENS = 48
GREEDY = SamplingOptions(temperature=0)


def read_bandwidth(data: torch.Tensor) -> float:
    """Bytes a second, the best of five passes."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def bytes_per_token(blueprint: Blueprint) -> int:
    """What one token makes the memory deliver."""
    config = blueprint.config
    shared = [blueprint.head] if blueprint.head else []
    for layer in range(config.num_hidden_layers):
        shared += [blueprint.qkv(layer), blueprint.o(layer)]
    experts = config.num_hidden_layers * config.num_experts_per_tok * blueprint.expert.nbytes
    return experts + sum(tensor.nbytes for spec in shared for tensor in spec.tensors)


def main(layers: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        write_synthetic(directory, layers)
        engine = load_engine(directory, LoadOptions(device="cpu"))
        with KeptModel(directory) as kept:
            blueprint = kept.blueprint
        measure(engine, blueprint, rounds)


def measure(engine: Engine, blueprint: Blueprint, rounds: int) -> None:
    per_token = bytes_per_token(blueprint)
    prompt = torch.randint(5, 32000, (64,)).tolist()
    data = torch.ones(250_000_000)

    def decode() -> float:
        ids = engine.generate(prompt, sampling=GREEDY, stop_ids=set(), max_tokens=TOKENS)
        assert len(list(ids)) == TOKENS
        return (TOKENS - 1) / engine.stats.decode_seconds

    decode()  # fills the cache
    ratios = []
    print(f"{torch.get_num_threads()} threads, {per_token / 1e6:.0f} MB a token")
    for _ in range(rounds):
        limit = read_bandwidth(data)
        speed = decode()
        ratios.append(speed * per_token / limit)
        print(
            f"{speed:6.2f} tok/s  {speed * per_token / 1e9:5.1f} GB/s  "
            f"limit {limit / 1e9:5.1f} GB/s  {ratios[-1]:.0%}"
        )
    print(f"median {statistics.median(ratios):.0%} of the limit")


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    main(*numbers, *(4, 9)[len(numbers) :])
