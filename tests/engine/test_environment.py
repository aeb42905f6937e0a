"""Torch is imported, by any thread, without what mixchat does not use."""

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


_LESS = """
import sys
from mixchat.engine.environment import import_less, prepare_environment

import_less()
prepare_environment()
import torch
print(not {"torch._decomp", "torch._prims"} & set(sys.modules))
from torch._meta_registrations import pooling_output_shape
from torch._subclasses import FakeTensorMode
print(pooling_output_shape(8, 2, 0, 2, 1, False), "torch._decomp" in sys.modules)
with FakeTensorMode():
    print(torch.empty(2, 3).cummax(1).values.shape)
"""


def test_the_command_imports_torch_without_registrations_until_they_are_used():
    """They took a fifth of torch's import."""
    done = subprocess.run([sys.executable, "-c", _LESS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True", "4 True", "torch.Size([2, 3])"]
