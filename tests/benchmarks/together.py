"""Several answers at once: their tokens a second together, beside one answer, and llama.cpp.

    python tests/benchmarks/together.py MODEL [--at-once 1 2 4 8] [--tokens 32] [--rounds 5]
        [--host-memory SIZE] [--gguf FILE --python PYTHON]

Each round measures all counts, one after the other, so that what else the machine does slows all
alike. FILE is the same model for llama.cpp, which computes as many sequences in one pass, as its
own server does. PYTHON has llama-cpp-python (see `peer_child.py`). With `--stall TOKENS` a prompt
of so many tokens joins an answer, and the longest time between two tokens of that is shown.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from statistics import median

from peer import Peer

from mixchat.base.errors import MixchatError
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.engine.environment import prepare_environment

prepare_environment()

from mixchat.engine.answer import TokenAnswer  # noqa: E402 - torch reads the environment
from mixchat.engine.generate import Engine  # noqa: E402
from mixchat.install.models import installed_directory  # noqa: E402
from mixchat.loading.loader import load_engine  # noqa: E402

_PROMPT = 16  # tokens


def prompt(engine: Engine, number: int, tokens: int, length: int = _PROMPT) -> TokenAnswer:
    """Return a prompt of random tokens, whose answer is sampled: other tokens, other experts."""
    choose = random.Random(number)
    ids = [choose.randrange(3, engine.config.vocab_size) for _ in range(length)]
    return TokenAnswer(ids, SamplingOptions(temperature=1.0, seed=number), frozenset(), tokens)


def decode(engine: Engine, at_once: int, tokens: int) -> float:
    """Return tokens a second of so many answers, all of which decode."""
    batch = engine.new_batch()
    seed = random.randrange(2**30)
    answers = [batch.add(prompt(engine, seed + n, tokens + 2)) for n in range(at_once)]
    while not all(answer.generated_tokens for answer in answers):
        batch.step()
    before = sum(answer.generated_tokens for answer in answers)
    start = time.perf_counter()
    while not any(answer.has_ended for answer in answers):
        batch.step()
    seconds = time.perf_counter() - start
    rate = (sum(answer.generated_tokens for answer in answers) - before) / seconds
    while batch.size:
        batch.step()
    return rate


def stall(engine: Engine, length: int) -> tuple[float, float]:
    """Return the longest and the median seconds between two tokens while a prompt is read."""
    batch = engine.new_batch()
    talking = batch.add(prompt(engine, 1, 10**6))
    for _ in range(6):
        batch.step()
    joining = batch.add(prompt(engine, 2, 1, length))
    seconds = []
    while not joining.has_ended:
        start = time.perf_counter()
        batch.step()
        seconds.append(time.perf_counter() - start)
    talking.cancel()
    batch.step()
    return max(seconds), median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--tokens", type=int, default=32, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--stall", type=int, metavar="TOKENS")
    parser.add_argument("--host-memory", metavar="SIZE")
    parser.add_argument("--gguf", type=Path, metavar="FILE")
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    budget = given.host_memory and MemoryBudget.parse(given.host_memory)
    load = LoadOptions(
        budget or None,
        exact_prompts=True,
        speculation=False,
        parallel=max(given.at_once),
        context_size=_PROMPT + given.tokens + (given.stall or 0) + 512,
    )
    engine = load_engine(installed_directory(given.model), load)
    peer = Peer(given.python, given.gguf, 4096) if given.gguf else None
    counts = given.at_once
    decode(engine, max(counts), 4)  # all experts are used once
    ours: dict[int, list[float]] = {n: [] for n in counts}
    theirs: dict[int, list[float]] = {n: [] for n in counts}
    for _ in range(given.rounds):
        for n in counts:
            ours[n].append(decode(engine, n, given.tokens))
            if peer is not None:
                theirs[n].append(peer.decode_together(n, given.tokens))
    print("AT ONCE  TOK/S   RANGE         TIMES ONE  LLAMA.CPP  TIMES")
    for n in counts:
        one = median(mine / first for mine, first in zip(ours[n], ours[counts[0]], strict=True))
        line = (
            f"{n:7}  {median(ours[n]):5.2f}   {min(ours[n]):5.2f}-{max(ours[n]):5.2f}  {one:9.2f}"
        )
        if peer is not None:
            ratio = median(mine / other for mine, other in zip(ours[n], theirs[n], strict=True))
            line += f"  {median(theirs[n]):9.2f}  {ratio:5.2f}"
        print(line)
    if given.stall:
        longest, middle = stall(engine, given.stall)
        print(
            f"a prompt of {given.stall} tokens joins: {longest:.2f} s at most between two tokens,"
        )
        print(f"{middle:.2f} s in the median")
    if peer is not None:
        peer.close()


if __name__ == "__main__":
    try:
        main()
    except MixchatError as error:
        raise SystemExit(f"error: {error}\nhint: {error.hint or 'none'}") from None
