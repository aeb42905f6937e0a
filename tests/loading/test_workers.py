"""Answers with workers: the bits of one machine, whoever computes and whoever fails."""

import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from paper_tools import EXPERTS, GREEDY, LAYERS, PROMPT
from served_workers import KEY, Fault, Nursery

from mixchat.base.options import LoadOptions
from mixchat.base.progress import Note
from mixchat.base.quantities import MemoryBudget
from mixchat.engine.generate import Engine
from mixchat.experts.workers.link import Link
from mixchat.loading.loader import load_engine
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.matrix.linear import LinearSpec

CONTEXT = 128

KINDS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4, odd shapes": {"hidden_size": 80, "intermediate_size": 112},
    "fp32, odd shapes": {"quant_type": "none", "hidden_size": 50, "intermediate_size": 49},
    "bf16, odd shapes": {
        "quant_type": "none",
        "stored_as": "bfloat16",
        "hidden_size": 50,
        "intermediate_size": 49,
    },
}
FAMILIES: dict[str, dict[str, Any]] = {
    "granitemoe": {"model_type": "granitemoe"},
    "gpt_oss in mxfp4": {"model_type": "gpt_oss", "stored_as": "mxfp4"},
    "dots1 after a dense layer": {"model_type": "dots1", "num_hidden_layers": LAYERS + 1},
}
FAST = "fp32, odd shapes"  # no kernel has to be compiled for it in a new process

# Slots of this machine, and of each worker.
SPLITS = {
    "one, half each": (6, [6]),
    "one, all twice": (12, [12]),
    "one, too few": (2, [3]),
    "two, unequal": (3, [7, 2]),
    "two, some twice": (6, [6, 5]),
    "three, all of it there": (2, [12, 12, 12]),
}


@pytest.fixture(scope="module")
def model(
    make_checkpoint: Callable[..., Path], install: Callable[..., Path]
) -> Callable[[str], Path]:
    """Return the model of a kind, installed when it is first asked for."""

    @functools.cache
    def model(kind: str) -> Path:
        shape = {"num_hidden_layers": LAYERS, **(KINDS | FAMILIES)[kind]}
        options = {name: shape.pop(name) for name in ("quant_type",) if name in shape}
        return install(make_checkpoint(**shape), **options)

    return model


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "worker.key"
    path.write_text(KEY.hex())
    path.chmod(0o600)
    return path


@pytest.fixture
def load(model: Callable[[str], Path], key_file: Path) -> Callable[..., Engine]:
    """Load an engine with so many slots, or all, and workers at these addresses."""

    def load(
        kind: str,
        slots: int = EXPERTS,
        addresses: Sequence[str] = (),
        note: Note = lambda line: None,
        exact: bool = False,
    ) -> Engine:
        with InstalledModel(model(kind)) as installed:
            budget = MemoryBudget(size=slots * installed.blueprint.expert.stride)
        options = LoadOptions(
            budget,
            context_size=CONTEXT,
            device="cpu",
            exact_prompts=exact,
            workers=tuple(addresses),
            key_file=key_file,
        )
        return load_engine(model(kind), options, note)

    return load


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    opened = Nursery()
    yield opened
    opened.end()


@pytest.fixture
def fork(nursery: Nursery) -> Iterator[Nursery]:
    """Start workers in processes, which end with the test."""
    yield nursery
    nursery.end_workers()


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker that hangs be lost after 2 s."""
    real = Link.__init__
    monkeypatch.setattr(Link, "__init__", lambda *given: real(*given, silence=2.0))


class Answer(NamedTuple):
    """The results of an engine without workers."""

    logits: torch.Tensor
    text: list[int]


@pytest.fixture(scope="module")
def alone(model: Callable[[str], Path]) -> Callable[..., Answer]:
    """Return what one machine computes with a kind, computed when it is first asked for."""

    @functools.cache
    def alone(kind: str, exact: bool = False) -> Answer:
        options = LoadOptions(context_size=CONTEXT, device="cpu", exact_prompts=exact)
        engine = load_engine(model(kind), options)
        return Answer(logits(engine), text(engine))

    return alone


def logits(engine: Engine) -> torch.Tensor:
    """Return the logits of a prompt's tokens, and of five decoded after them: [25, V]."""
    with torch.inference_mode():
        found = [
            engine.passes.model.forward(
                torch.tensor(ids),
                engine.held()[1],
                exact=engine.exact_prompts,
                logits_of=slice(None),
            )
            for ids in (PROMPT, [33], [60], [2], [95], [8])
        ]
        engine.forget()
        return torch.cat(found)


def links(engine: Engine) -> list[Link]:
    """Return the connections to workers that are not lost."""
    return [worker._link for worker in engine.experts.workers if worker._link]


def text(engine: Engine) -> list[int]:
    return list(engine.generate(PROMPT, sampling=GREEDY, stop_ids=set(), max_tokens=12))


@pytest.mark.parametrize(
    ("kind", "split", "exact"),
    [
        *((FAST, split, False) for split in SPLITS),
        *((kind, "two, some twice", False) for kind in KINDS if kind != FAST),
        ("nf4", "one, half each", True),
        (FAST, "two, unequal", True),
        ("gpt_oss in mxfp4", "one, too few", False),
        *((kind, "two, some twice", True) for kind in FAMILIES),
    ],
)
def test_who_computes_does_not_show_in_the_bits(load, fork, model, alone, kind, split, exact):
    here, there = SPLITS[split]
    addresses = [fork.start(model(kind), slots).address for slots in there]
    engine = load(kind, here, addresses, exact=exact)
    assert torch.equal(logits(engine), alone(kind, exact).logits)
    assert text(engine) == alone(kind, exact).text
    assert engine.slots_by_tier["worker"] == sum(there)
    assert all(link.seconds_computing for link in links(engine))


@pytest.mark.parametrize("many", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize(
    ("fault", "layer"),
    [(signal.SIGKILL, 0), (signal.SIGKILL, LAYERS - 1), (signal.SIGSTOP, 1)],
)
def test_an_answer_does_not_show_that_a_worker_fails_in_it(
    load, fork, model, alone, short_silence, fault, layer, many
):
    notes: list[str] = []
    first = fork.start(model(FAST), 5, Fault(fault, layer, many, count=0 if many else 3))
    other = fork.start(model(FAST), 3)
    engine = load(FAST, 4, [first.address, other.address], notes.append)
    assert text(engine) == alone(FAST).text
    reason = "it has ended, or does not answer"
    assert len(notes) == 1, notes
    (note,) = notes
    assert note.startswith(f"worker {first.address} is lost ({reason}")
    assert engine.slots_by_tier["worker"] == 3
    engine.forget()
    assert text(engine) == alone(FAST).text
    assert len(notes) == 1


@pytest.mark.parametrize("kind", [FAST, "nf4"])
def test_a_line_tells_of_a_worker_that_computes_otherwise(kind, load, fork, model, monkeypatch):
    others = {"bytes": "words", "words": "bytes"}
    real = LinearSpec.arithmetic
    notes: list[str] = []
    worker = fork.start(model(kind), 5)
    load(kind, 4, [worker.address], notes.append)
    assert notes == []
    here = ""

    def arithmetic(spec, device, *, exact):
        nonlocal here
        here = others.get(real(spec, device, exact=exact), "of another kind")
        return here

    monkeypatch.setattr(LinearSpec, "arithmetic", arithmetic)
    load(kind, 4, [worker.address], notes.append)
    (note,) = notes
    assert note.startswith(f"worker {worker.address} computes otherwise (")
    assert f"here: {here}" in note
    assert note.endswith("--exact-prompts makes them the same") == (here in others)


@pytest.mark.parametrize("slots", [2, 5, 9])
def test_a_worker_that_comes_back_is_taken_up_at_the_next_turn(load, fork, model, alone, slots):
    """Also where it has less memory, or more, than before."""
    worker = fork.start(model(FAST), 5)
    engine = load(FAST, 7, [worker.address])
    assert text(engine) == alone(FAST).text
    worker.kill()
    engine.forget()
    assert text(engine) == alone(FAST).text
    assert engine.slots_by_tier["worker"] == 0
    fork.start(model(FAST), slots, at=worker.address)
    engine.forget()
    assert text(engine) == alone(FAST).text
    assert engine.slots_by_tier["worker"] == min(slots, 5)
    (link,) = links(engine)
    assert link.seconds_computing > 0


def test_ctrl_c_in_the_midst_of_a_layer_leaves_the_next_answer_right(
    load, fork, model, alone, monkeypatch
):
    """The worker's answer to the layer that was interrupted must not be taken for the next one."""
    real = Link.__init__
    # A worker may need as long as the usual silence to notice that nobody takes what it sends.
    monkeypatch.setattr(Link, "__init__", lambda *given: real(*given, silence=30.0))
    worker = fork.start(model(FAST), 8)
    engine = load(FAST, 4, [worker.address])
    start = Link.start
    left = 0

    def start_and_interrupt(link, *request):
        nonlocal left
        start(link, *request)
        left -= 1
        if left == 0:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Link, "start", start_and_interrupt)
    for left in (1, 3, 6):  # noqa: B007
        with pytest.raises(KeyboardInterrupt):
            text(engine)
        assert text(engine) == alone(FAST).text
        assert engine.slots_by_tier["worker"] == 8
        engine.forget()


def test_ctrl_c_while_a_worker_is_taken_up_again_does_not_leave_it_out(
    load, fork, model, alone, monkeypatch
):
    """It stayed connected, and was never asked again."""
    worker = fork.start(model(FAST), 8)
    engine = load(FAST, 4, [worker.address])
    hold = Link.hold

    def hold_and_interrupt(link, keys):
        hold(link, keys)
        signal.raise_signal(signal.SIGINT)

    for link in links(engine):
        link.close()
    with monkeypatch.context() as patch:
        patch.setattr(Link, "hold", hold_and_interrupt)
        with pytest.raises(KeyboardInterrupt):
            text(engine)
    assert text(engine) == alone(FAST).text
    assert engine.slots_by_tier["worker"] == 8


def test_a_closed_engine_leaves_its_workers_to_another_one(load, alone, fork, model):
    """A chat that changes its model closes one engine, whose parts something may keep."""
    worker = fork.start(model(FAST), 6)
    first = load(FAST, 6, [worker.address])
    text(first)
    experts = first.experts
    first.close()
    second = load(FAST, 6, [worker.address])
    assert experts.slots_by_tier["worker"] == 0
    assert second.slots_by_tier["worker"] == 6
    assert text(second) == alone(FAST).text
