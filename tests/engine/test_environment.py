"""Torch is imported, by any thread. A command is sped up, a caller's process stays as it is."""

import os
import subprocess
import sys
from pathlib import Path

_IN_A_THREAD = """
import gc, sys, threading
from mixchat.base import interrupts
from mixchat.engine.environment import prepare_environment

interrupts.install()
thread = threading.Thread(target=prepare_environment)
thread.start()
thread.join()
import torch
print(gc.isenabled(), gc.get_freeze_count() > 100_000, int(torch.ones(2).sum()))
"""
_FAKE_TORCH = """
import gc, os, signal

def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return handlers, gc.isenabled(), gc.get_freeze_count()

state_at_import, spins = state(), os.environ["GOMP_SPINCOUNT"]

def empty(size):
    global pages
    pages = os.environ["THP_MEM_ALLOC_ENABLE"]
"""
_IN_A_PROGRAM = """
import gc, os, signal, sys
from mixchat.engine.environment import prepare_environment

sys.path.insert(0, sys.argv[1])
signal.signal(signal.SIGTERM, lambda number, frame: None)
gc.disable()
variables = dict(os.environ)
prepare_environment()
import torch
print(torch.state_at_import == torch.state(), gc.isenabled(), gc.get_freeze_count())
print(torch.spins, torch.pages, os.environ == variables)
"""


def run(code: str, *arguments: str) -> str:
    names = ("GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")
    variables = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    return done.stdout


def test_a_thread_imports_torch_and_its_objects_are_not_visited_again():
    """Collections took .3 s of each start."""
    assert run(_IN_A_THREAD) == "True True 2\n"


def test_a_program_that_uses_mixchat_keeps_its_signals_collector_and_variables(tmp_path: Path):
    """Its handlers were the system's meanwhile, and its collector was switched on afterwards."""
    (tmp_path / "torch.py").write_text(_FAKE_TORCH)
    assert run(_IN_A_PROGRAM, str(tmp_path)) == "True False 0\n10000 1 True\n"
