"""The end of models and answers, also of those that nobody closes, at exit and after a fork."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from patience import PATIENCE_S, wait_until

from mixchat.base.errors import UsageError

QUESTION = [{"role": "user", "content": "hell"}]
_DROPS_MODELS = """
import asyncio, gc, json, os, sys, threading, time, weakref
import mixchat
import psutil
import torch

gc.disable()  # nothing is to need it
process = psutil.Process()

def counts():
    return [threading.active_count(), process.num_fds(), len(process.children())]

def weights():
    tensors = (item for item in gc.get_objects() if type(item) is torch.Tensor)
    return sum(len(tensor.untyped_storage()) for tensor in tensors)

def use(model):
    form = {"type": "object", "properties": {}, "additionalProperties": False}
    list(model.chat(QUESTION, max_tokens=4, form=form))
    next(model.chat(QUESTION, max_tokens=0))  # half an answer
    asyncio.run(ask(model))
    engines.append(weakref.ref(model.engine))

async def ask(model):
    await model.achat(QUESTION, max_tokens=4).text()
    await anext(model.achat(QUESTION, max_tokens=0))  # half an answer

def after(models):
    for _ in range(models):
        use(mixchat.load(sys.argv[1], device="cpu"))
    end = time.monotonic() + 300
    while counts() != before and time.monotonic() < end:
        time.sleep(0.01)
    return counts(), weights()

QUESTION, engines = [{"role": "user", "content": "hell"}], []
before = counts()
print(json.dumps([before, after(1), after(2), [engine() is None for engine in engines]]))
"""
_ENDS_WITH_AN_ANSWER = """
import atexit, sys, threading, time
import mixchat
from mixchat.loading import tiers
from mixchat.weights.format.installed_model import InstalledModel

read = InstalledModel.read_expert

def read_at_the_end(*arguments, **options):
    while threading.main_thread().is_alive():
        time.sleep(0.01)
    read(*arguments, **options)

tiers.READS, InstalledModel.read_expert = 1, read_at_the_end  # the other experts wait
model = mixchat.load(sys.argv[1], device="cpu")
if sys.argv[2] == "close":
    atexit.register(model.close)
answer = model.chat([{"role": "user", "content": "hell"}], max_tokens=0)
print(next(answer).done, flush=True)
time.sleep(0.1)  # until it waits for an expert
"""
_FORKS = """
import os, sys
import mixchat

question = [{"role": "user", "content": "hell"}]
model = mixchat.load(sys.argv[1], device="cpu")
answer = model.chat(question, max_tokens=4)
texts = {True: "hello", False: "good night"}
ids = {side: model.tokenizer.encode(text) for side, text in texts.items()}
child = os.fork()
for _ in range(100):
    assert model.tokenizer.encode(texts[child == 0]) == ids[child == 0]
if child == 0:
    for ask in (lambda: model.chat(question), lambda: next(answer), lambda: model.do(print)):
        try:
            ask()
        except mixchat.MixchatError as error:
            print(error, flush=True)
    model.close()
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
print(list(answer)[-1].reason)
"""


@pytest.fixture
def run(installed: Path) -> Callable[..., str]:
    """Runs a program with the tiny model, and returns what it prints."""

    def run(program: str, *arguments: str) -> str:
        command = [sys.executable, "-c", program, str(installed), *arguments]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, timeout=PATIENCE_S
        )
        return done.stdout

    return run


def test_models_that_nobody_holds_leave_nothing(run: Callable[..., str]) -> None:
    """Each kept 400 MB, 63 descriptors, a thread and a process until the program ended."""
    before, (after_one, kept), (after_more, kept_of_more), are_gone = json.loads(run(_DROPS_MODELS))
    assert before == after_one == after_more
    assert kept == kept_of_more  # by a cache of modules
    assert are_gone == [True] * 3


@pytest.mark.parametrize("close", ["close", "none"])
def test_a_program_ends_while_an_answer_reads_experts(run: Callable[..., str], close: str) -> None:
    """`atexit.register(model.close)` waited for ever for reads, whose threads had ended."""
    assert run(_ENDS_WITH_AN_ANSWER, close) == "0\n"


def test_a_forked_process_is_refused_and_does_not_disturb_the_other(
    run: Callable[..., str],
) -> None:
    """It waited for ever, and both got token ids of the other's texts."""
    refused = "the model was loaded before this process was forked\n"
    assert run(_FORKS) == refused * 3 + "length\n"


def test_a_second_thread_that_reads_an_answer_is_refused(load: Callable[..., Any]) -> None:
    """It waited for ever, because the other one had got the end."""
    model = load()
    may_continue, faults = threading.Event(), []

    def read() -> None:
        try:
            next(answer)
        except UsageError as error:
            faults.append(str(error))
            may_continue.set()

    holding = threading.Thread(target=model.do, args=[lambda engine: may_continue.wait(PATIENCE_S)])
    holding.start()
    answer = model.chat(QUESTION, max_tokens=4)
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for thread in (holding, *readers):
        thread.join()
    assert faults == ["another thread is reading this answer"]
    assert list(answer)[-1].reason == "length"


def test_the_processes_of_forms_end_with_their_answers(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty answers left ten processes behind, until garbage was collected."""
    model = load()
    before = children()
    gc.disable()
    try:
        for number in range(3):
            schema = {"type": "object", "properties": {f"a{number}": {"const": 1}}}
            answers = [model.chat(QUESTION, form=schema, max_tokens=3) for _ in range(2)]
            for answer in answers:
                list(answer)
            assert len(children() - before) <= 1  # for the next answer
        monkeypatch.setattr("mixchat.text.form.constraint._IDLE_S", 0.01)
        list(model.chat(QUESTION, form=schema, max_tokens=3))
        wait_until(lambda: not children() - before)
    finally:
        gc.enable()


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())
