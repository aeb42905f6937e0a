"""Finds what Triton needs to start kernels on this machine."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path


def missing() -> str | None:
    """Return what is missing for kernels and how to get it, as the end of a sentence, or None.

    Triton compiles kernels by itself. To start them it builds an extension module of Python with
    the system's C compiler (`triton/runtime/build.py`): the one that CC names, else gcc or clang.
    """
    # PyTorch's CUDA wheel brings cuda-bindings, whose cuLaunchKernel starts a kernel without a
    # compiler. But whoever calls it has to do what Triton's launcher does: tell integers of 1 and
    # multiples of 16 from others, choose the compiled kernel by them, and lay out arguments as this
    # version of Triton wants them. The ROCm wheel brings nothing like it. That is much code for the
    # few machines without a compiler, and a package cures them. The CPU computes there.
    if importlib.util.find_spec("triton") is None:
        return "Triton is missing, which PyTorch brings on Linux: pip install triton"
    # Its import takes half a second, which nobody waits for unless there is a GPU.
    import triton

    if not hasattr(triton, "constexpr_function"):  # since 3.5, and codes.py needs it
        return (
            f"kernels need PyTorch 2.9 and Triton 3.5 or newer, and Triton {triton.__version__} is "
            "installed: pip install -U torch"
        )
    chosen = os.environ.get("CC")
    if not any(map(shutil.which, [chosen] if chosen else ["gcc", "clang"])):
        named = f" (CC={chosen} is not there)" if chosen else ""
        return f"Triton needs a C compiler to start kernels{named}: apt install gcc"
    if not _has_headers():
        return "Triton needs Python's headers to start kernels: apt install python3-dev"
    return None


def _has_headers() -> bool:
    scheme = sysconfig.get_default_scheme()
    # As Triton does, because the folder that Debian's own scheme names is empty.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    return Path(sysconfig.get_paths(scheme=scheme)["include"], "Python.h").exists()
