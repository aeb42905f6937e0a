"""Ctrl-C at random moments, with experts on disk: no answer hangs, and the next one is right.

    python tests/campaigns/interrupts.py [--rounds 20000] [--seed 0]

In each round a question is asked and interrupted, as in a chat or as for one answer. The next
answer, which is not interrupted, must equal that of an engine that holds all experts. The cache
holds 4 of 16 experts. Exit code 0: no fault was found.
"""

import contextlib
import faulthandler
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rig

sys.path.insert(0, str(rig.HERE.parent / "chat"))

PATIENCE = 60  # seconds, after which a round counts as hung
EXPERTS = 4  # in the cache
LONGEST = 6  # tokens of an answer


class Presser:
    """Sends SIGINT to the main thread, some seconds after it was started."""

    def __init__(self) -> None:
        self._started, self.sent = threading.Event(), threading.Event()
        self._seconds = 0.0
        threading.Thread(target=self._press, daemon=True).start()

    def press(self, seconds: float) -> None:
        self.sent.clear()
        self._seconds = seconds
        self._started.set()

    def _press(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while True:
            self._started.wait()
            self._started.clear()
            end = time.perf_counter() + self._seconds
            while (left := end - time.perf_counter()) > 0:
                time.sleep(left if left > 0.001 else 0)
            signal.pthread_kill(main, signal.SIGINT)
            self.sent.set()


def open_session(model: Path, experts: int | None) -> Any:
    """A conversation with an engine that holds so many experts, or all."""
    from chat_doubles import CharacterTokenizer, TinyTemplate

    from mixchat.base.options import ChatOptions, LoadOptions, SamplingOptions
    from mixchat.base.quantities import MemoryBudget
    from mixchat.chat.session import ChatSession
    from mixchat.face.model import Model, ModelText
    from mixchat.loading.loader import load_engine
    from mixchat.weights.format.installed_model import InstalledModel

    stride = InstalledModel(model).blueprint.expert.stride
    budget = None if experts is None else MemoryBudget(size=experts * stride)
    options = LoadOptions(device="cpu", context_size=256, host_memory=budget)
    greedy = SamplingOptions(temperature=0.0)
    text = ModelText(CharacterTokenizer(), TinyTemplate(), greedy)
    opened = Model("tiny", lambda: load_engine(model, options), text)
    assert experts is None or opened.engine.experts.slots == experts
    return ChatSession(opened, ChatOptions(max_tokens=LONGEST))


def interrupted(session: Any, question: str, in_chat: bool, presser: Presser, at: float) -> str:
    """Ask, and press Ctrl-C so many seconds later: how that ended."""
    from mixchat.base import interrupts

    stopping = interrupts.stopping(session.interrupt) if in_chat else contextlib.nullcontext()
    ended = "before the answer"
    try:
        presser.press(at)
        with stopping:
            ended = "in the answer"
            for event in session.ask(question):
                reason = getattr(event, "reason", None)
        ended = f"answer: {reason}"
        presser.sent.wait()
        time.sleep(0)
    except KeyboardInterrupt:
        presser.sent.wait()
    return f"{'chat' if in_chat else 'one'}, {ended}"


def rounds(count: int, seed: int, model: Path) -> Iterator[str]:
    """The faults."""
    from mixchat.base import interrupts

    chance = random.Random(seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    interrupts.install()
    session, reference = open_session(model, EXPERTS), open_session(model, None)
    began, presser, ends = time.monotonic(), Presser(), Counter[str]()
    list(session.ask("warm up"))
    typical = measured(lambda: list(session.ask("how long?")))
    for number in range(count):
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        if len(session.history) > 12:
            session.clear()
        question = "".join(chance.choices("abcdefgh ?", k=chance.randrange(1, 12)))
        at = chance.random() * typical * 1.3
        ends[interrupted(session, question, chance.random() < 0.5, presser, at)] += 1
        if number % 50 == 0:
            typical = 0.5 * typical + 0.5 * measured(lambda: list(session.ask("how long?")))
        if (fault := next_answer_is_wrong(session, reference)) is not None:
            yield f"round {number}: {fault}"
        if number % 1000 == 999:
            print(f"{number + 1} rounds, {time.monotonic() - began:.0f} s", flush=True)
    faulthandler.cancel_dump_traceback_later()
    if count >= 100 and sum(n for end, n in ends.items() if "interrupted" in end) < count / 10:
        yield f"hardly an answer was interrupted: {dict(ends)}"
    rig.table(f"{count} interrupts in {time.monotonic() - began:.0f} s", dict(ends))
    print(
        f"  an answer takes {typical * 1e3:.1f} ms; {session.engine.experts.stats.misses.total()}"
    )
    print("  experts were fetched while somebody waited")


def next_answer_is_wrong(session: Any, reference: Any) -> str | None:
    """The next answer, of both engines: what is wrong with it."""
    reference.restore(session.history)
    texts = []
    for one in (session, reference):
        list(one.ask("next"))
        texts.append(one.history[-1].ids)
        one.undo()
    if texts[0] == texts[1]:
        return None
    return f"{texts[0]} instead of {texts[1]}"


def measured(work: Callable[[], object]) -> float:
    """The seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def make_model(work: Path) -> Path:
    """A random model in fp32, so that rounding decides nowhere."""
    import torch

    from mixchat.install.make.from_checkpoint import CheckpointBuild
    from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
    from mixchat.install.source.checkpoint import DirectoryCheckpoint
    from mixchat.weights.format.manifest import Source

    checkpoint = rig.make_checkpoint(work / "checkpoint", dtype=torch.float32, **rig.TINY)
    opened = DirectoryCheckpoint(checkpoint, Source("test"))
    blueprint = make_blueprint(opened.index, QuantizeOptions(quant_type="none"))
    CheckpointBuild(opened, work / "model", blueprint).run()
    return work / "model"


def main() -> None:
    asked = rig.parsed(__doc__, rounds=20_000, seed=0)
    with rig.workplace() as work:
        rig.warm_up()
        faults = list(rounds(asked.rounds, asked.seed, make_model(work)))
    sys.exit(rig.told(faults))


if __name__ == "__main__":
    main()
