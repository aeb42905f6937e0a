"""llama.cpp's formats of weights, and the way from one to another. Imports nothing of mixchat."""

from __future__ import annotations

import ctypes
from pathlib import Path

FORMATS = ("F16", "Q8_0", "Q4_0", "Q4_K_M", "Q3_K_M")
_F16 = 1  # of ggml's types


def requantize(source: Path, target: Path, name: str, *, feed_forward_only: bool = False) -> None:
    """Write the model of `source` to `target` in another format, as llama-quantize does.

    In most of them some matrices get more bits than their name says. With `feed_forward_only` all
    other matrices get 16 bits, as by llama-quantize's --tensor-type.
    """
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    params.allow_requantize = True
    exact = (llama_cpp.llama_model_tensor_override * 2)((b"attn_", _F16), (None, 0))
    if feed_forward_only:
        params.output_tensor_type = params.token_embedding_type = _F16
        params.tt_overrides = exact
    files = str(source).encode(), str(target).encode()
    if llama_cpp.llama_model_quantize(*files, ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot quantize {source} to {name}")
