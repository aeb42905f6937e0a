"""Signals raise in ordinary code; in bookkeeping they are deferred until nothing is half done."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from patience import PATIENCE_S

from mixchat.base import interrupts

BEGINNING = """
import os, signal, sys, time
from mixchat.base import interrupts
interrupts.install()

def send(number):
    os.kill(os.getpid(), number)
"""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Python's own handler before each test, and after it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_deferred_to_the_end_of_the_outer_block():
    done = []

    def work():
        with interrupts.deferred():
            press()
            done.append("one")
            with interrupts.deferred():
                done.append("two")
            done.append("three")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["one", "two", "three"]


def test_a_deferred_ctrl_c_is_raised_once_by_check():
    with interrupts.deferred():
        interrupts.check()
        press()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.check()


def test_another_thread_neither_defers_nor_raises_signals():
    heard: list[BaseException] = []

    def other():
        with interrupts.deferred():
            try:
                interrupts.check()
            except BaseException as error:
                heard.append(error)

    thread = threading.Thread(target=other)
    with interrupts.deferred():
        press()
        thread.start()
        thread.join()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert heard == []


def test_the_first_ctrl_c_stops_an_answer_and_the_second_one_raises():
    asked: list[bool] = []

    def ask():
        asked.append(True)
        return True

    with interrupts.stopping(lambda: ask() and len(asked) == 1):
        press()
        with pytest.raises(KeyboardInterrupt):
            press()


def test_an_answer_that_does_not_end_soon_is_ended():
    with interrupts.stopping(lambda: True):
        press()
        with pytest.raises(KeyboardInterrupt):
            threading.Event().wait(PATIENCE_S)


def test_ctrl_c_for_an_answer_that_has_ended_does_not_end_the_next_one(monkeypatch):
    """The time limit may pass in the moment in which the answer ends."""
    first, second = (lambda: True), (lambda: True)
    with interrupts.stopping(first):
        press()
    with interrupts.stopping(second):
        monkeypatch.setattr(interrupts._state, "overdue", first)
        press()  # as the timer does
        assert interrupts._state.overdue is None


def run(code: str, *before: str) -> subprocess.CompletedProcess[str]:
    command = [*before, sys.executable, "-c", BEGINNING + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


SAVING = """
with interrupts.deferred(), interrupts.saving():
    send({:d})
    time.sleep(2)
    print('done', flush=True)
"""
CLEANING_UP = f"""
try:
    send({{:d}})
    time.sleep(50)
finally:
    send({signal.SIGTERM:d})
    send({signal.SIGINT:d})
    print('done', flush=True)
"""
# As in a native function that does not return: no code gets the exception.
STUCK = "with interrupts.deferred():\n    send({:d})\n    time.sleep(50)"
# Exceptions in callbacks are printed and ignored: a run continued to exit code 0.
SWALLOWING = """
class Gone:
    def __del__(self):
        send({:d})
        [None for _ in range(1000)]
Gone()
try:
    time.sleep(50)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("code", "number", "printed"),
    [
        (SAVING, signal.SIGTERM, "done\n"),
        (CLEANING_UP, signal.SIGHUP, "done\n"),
        *((STUCK, number, "") for number in interrupts.ENDING),
        *((SWALLOWING, number, "") for number in (signal.SIGTERM, signal.SIGINT)),
    ],
    ids=["saving", "cleaning up", *["stuck"] * len(interrupts.ENDING), *["swallowing"] * 2],
)
def test_a_signal_ends_a_process_whatever_it_does_after_what_has_to_be_finished(
    code, number, printed
):
    done = run(code.format(number))
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, printed, "")


def test_other_swallowed_exceptions_are_printed_as_always():
    done = run("class Gone:\n    def __del__(self): raise ValueError('lost')\nGone()")
    assert done.returncode == 0
    assert "ValueError: lost" in done.stderr


def test_a_process_under_nohup_continues_when_its_terminal_is_closed():
    code = (
        "with interrupts.starting():\n"
        f"    send({signal.SIGHUP:d})\n"
        f"send({signal.SIGHUP:d})\n"
        "interrupts.use_defaults()\n"
        f"send({signal.SIGHUP:d})\n"
        "print('still here')\n"
    )
    done = run(code, "nohup")
    assert (done.returncode, done.stdout) == (0, "still here\n")


@pytest.mark.parametrize("number", [*interrupts.ENDING, signal.SIGINT])
def test_a_signal_while_torch_is_imported_ends_it_at_once(tmp_path, number):
    """An exception broke numpy ("CPU dispatcher tracer already initialized", exit code 1)."""
    package = f"{tmp_path}/torch.py"
    with open(package, "w") as file:
        file.write(
            "import os, time\n"
            "try:\n"
            f"    os.kill(os.getpid(), {number:d})\n"
            "    time.sleep(50)\n"
            "except BaseException:\n"
            "    raise RuntimeError('CPU dispatcher tracer already initialized')\n"
        )
    code = (
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from mixchat.engine.environment import prepare_environment\n"
        "prepare_environment()\n"
    )
    done = run(code)
    assert (done.returncode, done.stderr) == (-number, "")
