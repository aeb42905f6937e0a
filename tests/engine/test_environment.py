"""Torch is imported, by any thread, and collections leave alone what it made."""

import subprocess
import sys

_IN_A_THREAD = """
import gc, sys, threading
from mixchat.engine.environment import prepare_environment

thread = threading.Thread(target=prepare_environment)
thread.start()
thread.join()
import torch
print(gc.isenabled(), gc.get_freeze_count() > 100_000, int(torch.ones(2).sum()))
"""


def test_a_thread_imports_torch_and_its_objects_are_not_visited_again():
    """Collections took .3 s of each start."""
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_THREAD], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True True 2\n"
