"""llama.cpp's formats of weights, and the way from one to another. Imports nothing of mixchat."""

from __future__ import annotations

import ctypes
from pathlib import Path

FORMATS = ("F16", "Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M")


def requantize(source: Path, target: Path, name: str) -> None:
    """Write the model of `source` to `target` in another format, as llama-quantize does.

    In most of them some matrices get more bits than their name says.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.allow_requantize = True
    files = str(source).encode(), str(target).encode()
    if llama_cpp.llama_model_quantize(*files, ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot quantize {source} to {name}")
