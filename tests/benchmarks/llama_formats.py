"""llama.cpp's formats of weights, and the way from one to another. Imports nothing of mixchat."""

from __future__ import annotations

import ctypes
from pathlib import Path

# True: all matrices become of it; in the others, some get more bits.
FORMATS = {"F16": False, "Q8_0": True, "Q4_0": True, "Q4_K_M": False, "Q3_K_M": False}


def requantize(source: Path, target: Path, name: str) -> None:
    """Write the model of `source` to `target` in another format."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"), FORMATS[name]
    params.allow_requantize = True
    files = str(source).encode(), str(target).encode()
    if llama_cpp.llama_model_quantize(*files, ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot quantize {source} to {name}")
