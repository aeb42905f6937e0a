"""A cache smaller than the model, on Mixtral's real layer shapes: same ids, hit rate, bytes read.

python tests/benchmarks/offload.py [LAYERS] [SLOTS]          (2 layers = 16 experts, 4 slots)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from synthetic import write_synthetic

from mixchat.engine.loader import LoadOptions, load_engine
from mixchat.engine.sampling import SamplingOptions
from mixchat.settings import MemoryBudget
from mixchat.weights.checkpoint import KeptModel

TOKENS = 64
GREEDY = SamplingOptions(temperature=0)


def main(layers: int, slots: int) -> None:
    prompt = torch.randint(5, 32000, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        write_synthetic(directory, layers)
        with KeptModel(directory) as kept:
            stride, experts = kept.blueprint.expert.stride, kept.blueprint.expert_count
        answers = []
        for count in (experts, slots, 2):
            budget = MemoryBudget(size=count * stride)
            engine = load_engine(directory, LoadOptions(budget, device="cpu"))
            ids = engine.generate(prompt, sampling=GREEDY, stop_ids=set(), max_tokens=TOKENS)
            answers.append(list(ids))
            stats = engine.expert_stats
            print(
                f"{stats.slots:3d} of {experts} experts in RAM: {stats.hits} hits, "
                f"{stats.misses} misses ({stats.hit_rate:.1%}), "
                f"{stats.bytes_moved / 1e9:.2f} GB moved, "
                f"decode {(TOKENS - 1) / engine.stats.decode_seconds:.2f} tok/s, "
                f"same ids: {answers[-1] == answers[0]}"
            )


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    main(*numbers, *(2, 4)[len(numbers) :])
