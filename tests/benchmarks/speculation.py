"""Speculation: tokens a second with and without it, and whether answers are the same.

    python tests/benchmarks/speculation.py exact MODEL [--prompts 200] [--tokens 96]
    python tests/benchmarks/speculation.py tasks MODEL [--prompts 8] [--tokens 200] [--rounds 3]
        [--record FILE]
    python tests/benchmarks/speculation.py replay MODEL FILE [--rounds 3]

MODEL is the directory of an installed model; all take --host-memory SIZE. `exact` answers generated
prompts, greedily and sampled in turn, and counts the answers that are the same, byte for byte.

`tasks` has three kinds of prompts: to repeat a file with a name changed, to quote from a text, and
plain questions. The answers to the first two are begun for the model, because one as small as the
demo does not follow such requests, but continues what it has begun. Each prompt is answered with
and without speculation, one right after the other, so that what else the machine does strikes both
alike; which of them comes first alternates. The engine with it is kept, as in a chat. `--record`
saves the texts.

`replay` lets another model "write" these texts: its own choice of a token is replaced by the text's
next one, so that exactly as many proposals are right as on the recorded model, while each pass
takes what it takes on this one. `python -m mixchat.bench.synthetic` writes one with Mixtral's
layer shapes. Its routers choose evenly; they get the tokens of real text.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import re
import sys
import textwrap
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING
from unittest import mock

from mixchat.engine.environment import prepare_environment

if TYPE_CHECKING:
    from mixchat.engine.generate import Engine

SEED = 5
_FILE_LINES, _BEGUN_LINES, _BEGUN_WORDS = 45, 6, 6
# Python's own modules: every machine has the same ones.
_MODULES = ("bisect", "heapq", "textwrap", "fnmatch", "shlex", "queue", "sched", "cmd", "calendar")
_QUESTIONS = (
    "How do I bake bread?",
    "Tell me a story about a fox and a crow.",
    "Explain why the sky is blue.",
    "What should I see in Rome?",
    "How does a bicycle stay upright?",
    "What is a black hole?",
    "Write a letter to my landlord about a broken heater.",
    "Explain recursion to a child.",
    "What were the causes of the First World War?",
    "Plan a week of meals.",
)


@dataclass(frozen=True)
class Task:
    """A kind of prompt, and what was written behind it."""

    kind: str
    prompt: list[int]
    answer: list[int]


@dataclass
class Side:
    """The work of one side in a round of a kind of task."""

    tokens: int = 0
    seconds: float = 0.0
    passes: int = 0
    proposed: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["exact", "tasks", "replay"])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--host-memory")
    given = parser.parse_args()
    prepare_environment()
    if given.what == "exact":
        same = exact(given.model, given.prompts or 200, given.tokens or 96, given.host_memory)
        sys.exit(0 if same else 1)
    if given.what == "tasks":
        tasks = prompts_of(given.model, given.prompts or 8)
        done = measure(given.model, tasks, given.rounds, given.tokens or 200, given.host_memory)
        if given.record is not None:
            given.record.write_text(json.dumps([asdict(task) for task in done]))
        return
    if given.file is None:
        parser.error("replay needs the FILE that `tasks --record` wrote")
    recorded = [Task(**task) for task in json.loads(given.file.read_text())]
    measure(given.model, recorded, given.rounds, None, given.host_memory)


class Both:
    """One engine with and without speculation, so that the model is in memory once."""

    def __init__(self, model: Path, host_memory: str | None = None) -> None:
        from mixchat.base.options import LoadOptions
        from mixchat.base.quantities import MemoryBudget
        from mixchat.loading.loader import load_engine

        budget = None if host_memory is None else MemoryBudget.parse(host_memory)
        self.engine = load_engine(model, LoadOptions(host_memory=budget, device="cpu"))
        self._speculation = self.engine.speculation
        if self._speculation is None:
            sys.exit("there is no speculation with this model on this machine")

    def choose(self, speculates: bool) -> Engine:
        """Return the engine with an empty cache, with or without speculation."""
        self.engine.speculation = self._speculation if speculates else None
        self.engine.forget()
        return self.engine


def exact(model: Path, prompts: int, tokens: int, host_memory: str | None) -> bool:
    """Print how many answers are the same with and without speculation; return if all are."""
    from mixchat.base.options import SamplingOptions

    both, choose = Both(model, host_memory), random.Random(SEED)
    config = both.engine.config
    texts = [task.prompt for task in prompts_of(model, 10)]
    same = accepted = proposed = 0
    for number in range(prompts):
        ids = generated_prompt(choose, texts, config.vocab_size)
        temperature = (0.0, 0.3, 0.8)[number % 3]
        sampling = SamplingOptions(temperature=temperature, seed=number)
        found = []
        for speculates in (True, False):
            engine = both.choose(speculates)
            answer = engine.generate(
                ids, sampling=sampling, stop_ids=set(config.eos_token_ids), max_tokens=tokens
            )
            found.append((list(answer), engine.held()[0]))
            accepted += engine.stats.speculation.accepted
            proposed += engine.stats.speculation.proposed
        same += found[0] == found[1]
    print(f"{same} of {prompts} answers are the same; {accepted} of {proposed} tokens accepted")
    return same == prompts


def generated_prompt(
    choose: random.Random, texts: Sequence[list[int]], vocabulary: int
) -> list[int]:
    """Return a piece of a text, random tokens, or a mixture, often with a repetition at the end."""
    text = choose.choice(texts)
    start = choose.randrange(len(text))
    ids = text[start : start + choose.randrange(1, 120)]
    ids += [choose.randrange(vocabulary) for _ in range(choose.choice((0, 0, 3, 20)))]
    if choose.random() < 0.7:
        ids += ids[: choose.randrange(1, len(ids) + 1)]
    return ids


def prompts_of(model: Path, count: int) -> list[Task]:
    """Return `count` prompts of each kind, without answers."""
    from mixchat.text.choose import load_template, load_tokenizer
    from mixchat.text.messages import Message

    tokenizer, choose = load_tokenizer(model), random.Random(SEED)
    template = load_template(model, tokenizer)

    def task(kind: str, question: str, begun: str = "") -> Task:
        ids = template.encode([Message("user", question)])
        return Task(kind, [*ids, *tokenizer.encode(begun)] if begun else [*ids], [])

    made = []
    for number in range(count):
        module = __import__(_MODULES[number % len(_MODULES)])
        made.append(task("edit", *edit_of(module, choose)))
        made.append(task("quote", *quote_of(module, choose)))
        made.append(task("chat", _QUESTIONS[number % len(_QUESTIONS)]))
    return made


def edit_of(module: types.ModuleType, choose: random.Random) -> tuple[str, str]:
    """Return the request to rename something in a part of a module, and the answer's beginning."""
    lines = inspect.getsource(module).splitlines()
    start = choose.randrange(max(1, len(lines) - _FILE_LINES))
    part = lines[start : start + _FILE_LINES]
    text = "\n".join(part)
    names = sorted({name for name in re.findall(r"[a-z_]{3,}", text) if text.count(name) > 2})
    name = choose.choice(names or ["self"])
    begun = "\n".join(part[:_BEGUN_LINES]).replace(name, f"new_{name}")
    question = f"Repeat this file, with {name} renamed to new_{name}:\n\n```python\n{text}\n```"
    return question, f"```python\n{begun}\n"


def quote_of(module: types.ModuleType, choose: random.Random) -> tuple[str, str]:
    """Return the request to quote from a module's texts, and the beginning of a quotation."""
    texts = re.findall(r'"""(.*?)"""', inspect.getsource(module), re.S)
    text = " ".join(" ".join(map(textwrap.dedent, texts)).split())[:2500]
    sentences = [one for one in re.split(r"(?<=[.])\s", text) if len(one.split()) > 10]
    words = choose.choice(sentences or [text]).split()
    question = f"{text}\n\nQuote three sentences of this text, word for word."
    return question, 'The text says: "' + " ".join(words[:_BEGUN_WORDS])


def measure(
    model: Path, tasks: Sequence[Task], rounds: int, tokens: int | None, host_memory: str | None
) -> list[Task]:
    """Print both rates for each kind of task; return the tasks with their answers.

    Without `tokens` the answers are those of the tasks, whatever the model would say.
    """
    both = Both(model, host_memory)
    kinds = list(dict.fromkeys(task.kind for task in tasks))
    sides: dict[str, list[list[Side]]] = {kind: [] for kind in kinds}
    run(both.choose(False), tasks[0], tokens, Side())  # brings the experts in
    done, order = [], [0, 1]
    for _ in range(rounds):
        done = []
        for kind in kinds:
            pair = [Side(), Side()]
            for task in (task for task in tasks if task.kind == kind):
                order.reverse()
                answers = [
                    run(both.choose(speculates=side == 0), task, tokens, pair[side])
                    for side in order
                ]
                if answers[0] != answers[1]:
                    sys.exit(f"an answer ({kind}) is not the same with and without speculation")
                done.append(Task(kind, task.prompt, answers[0]))
            sides[kind].append(pair)
    for kind, pairs in sides.items():
        print(line_of(kind, pairs), flush=True)
    return done


def line_of(kind: str, pairs: Sequence[Sequence[Side]]) -> str:
    """Return the rates of a kind, as medians of all rounds, and what the last round accepted."""
    ratios = [one.rate / other.rate for one, other in pairs]
    with_it, without = (median(pair[n].rate for pair in pairs) for n in (0, 1))
    did = pairs[-1][0]
    share = did.accepted / did.proposed if did.proposed else 0.0
    return (
        f"{kind:6} {with_it:7.2f} tok/s with, {without:7.2f} without: "
        f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); {did.accepted} of "
        f"{did.proposed} proposed tokens accepted ({share:.0%}), in {did.passes} passes; "
        f"{did.accepted / did.tokens:.0%} of the answer"
    )


def run(engine: Engine, task: Task, tokens: int | None, side: Side) -> list[int]:
    """Answer a task, and add to `side` what was done."""
    answer = answer_of(engine, task, tokens)
    stats = engine.stats
    side.tokens += len(answer) - 1  # the first one comes from the prefill
    side.seconds += stats.decode_seconds
    side.passes += stats.speculation.passes
    side.proposed += stats.speculation.proposed
    side.accepted += stats.speculation.accepted
    return answer


def answer_of(engine: Engine, task: Task, tokens: int | None) -> list[int]:
    """Return the model's answer, or the task's own where there is no count of tokens."""
    from mixchat.base.options import SamplingOptions
    from mixchat.engine.sampling import Sampler

    greedy, size = SamplingOptions(temperature=0), engine.config.vocab_size
    if tokens is not None:
        stop_ids = set(engine.config.eos_token_ids)
        ids = engine.generate(task.prompt, sampling=greedy, stop_ids=stop_ids, max_tokens=tokens)
        return list(ids)
    prompt, script = ([token % size for token in ids] for ids in (task.prompt, task.answer))
    with mock.patch.object(Sampler, "sample", side_effect=script):
        return list(
            engine.generate(prompt, sampling=greedy, stop_ids=set(), max_tokens=len(script))
        )


if __name__ == "__main__":
    main()
