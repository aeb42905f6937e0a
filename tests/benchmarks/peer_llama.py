"""llama.cpp on Mixtral's real layer shapes, for `beyond_memory.py` to stand beside.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python==0.3.36 gguf     (compiles a while)
    python tests/benchmarks/peer_llama.py make FILE.gguf LAYERS       pure Q4_0, 0.8 GB a layer
    python tests/benchmarks/peer_llama.py bench FILE.gguf PROMPT TOKENS

The weights are random as those of `synthetic.py` are: a large embedding to which each layer adds
little, so that tokens look different to the routers and go to experts evenly. `bench` leaves the
weights in the mapped file, which is the only way for a file larger than memory.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from math import prod

import numpy as np

HIDDEN, INNER, EXPERTS, KV, VOCAB = 4096, 14336, 8, 1024, 32000
LARGE, SMALL = 0.22, 0.00014  # scales of blocks: weights of 1, and of 0.0006 in the mean
PIECE = 2**24  # weights that are written at once

Tensor = tuple[str, tuple[int, ...], float | None]  # name, shape, scale of its blocks; None: F32


def tensors(layers: int) -> Iterator[Tensor]:
    """All tensors of the file."""
    yield "token_embd.weight", (VOCAB, HIDDEN), LARGE
    yield "output_norm.weight", (HIDDEN,), None
    yield "output.weight", (VOCAB, HIDDEN), SMALL
    for layer in range(layers):
        block = f"blk.{layer}."
        yield f"{block}attn_norm.weight", (HIDDEN,), None
        yield f"{block}ffn_norm.weight", (HIDDEN,), None
        for name, rows in (("q", HIDDEN), ("k", KV), ("v", KV), ("output", HIDDEN)):
            yield f"{block}attn_{name}.weight", (rows, HIDDEN), SMALL
        yield f"{block}ffn_gate_inp.weight", (EXPERTS, HIDDEN), None
        yield f"{block}ffn_gate_exps.weight", (EXPERTS, INNER, HIDDEN), SMALL
        yield f"{block}ffn_up_exps.weight", (EXPERTS, INNER, HIDDEN), SMALL
        yield f"{block}ffn_down_exps.weight", (EXPERTS, HIDDEN, INNER), SMALL


def make(path: str, layers: int) -> None:
    """Write a model of so many layers."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32768)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(32)
    writer.add_head_count_kv(8)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_dimension_count(128)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")
    for name, shape, scale in tensors(layers):
        quantized = scale is not None
        kind = gguf.GGMLQuantizationType.Q4_0 if quantized else gguf.GGMLQuantizationType.F32
        raw = (*shape[:-1], shape[-1] // 32 * 18) if quantized else shape
        size = prod(raw) * (1 if quantized else 4)
        dtype = np.dtype(np.uint8 if quantized else np.float32)
        writer.add_tensor_info(name, raw, dtype, size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for name, shape, scale in tensors(layers):
        if scale is not None:
            writer.write_tensor_data(_q4_0(random, shape, scale))
        elif "norm" in name:
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            writer.write_tensor_data(0.02 * random.standard_normal(shape, np.float32))
    writer.close()


def _q4_0(random: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Blocks of 32 weights in 18 bytes: the scale in 16 bits, then 32 codes of 4 bits."""
    blocks = random.integers(0, 256, (prod(shape) // 32, 18), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8)
    return blocks.reshape(*shape[:-1], shape[-1] // 32 * 18)


def bench(path: str, prompt: int, tokens: int) -> None:
    """Print the rates of a prompt and of the tokens after it, each another random token."""
    import llama_cpp as llama

    began = time.perf_counter()
    llama.llama_backend_init()
    options = llama.llama_model_default_params()
    options.use_extra_bufts = False  # no second copy of the weights in another order
    model = llama.llama_model_load_from_file(path.encode(), options)
    params = llama.llama_context_default_params()
    params.n_ctx = prompt + tokens + 8
    params.n_threads = params.n_threads_batch = os.cpu_count() or 2
    context = llama.llama_init_from_model(model, params)
    random = np.random.default_rng(1)

    def run(count: int) -> float:
        ids = (llama.llama_token * count)(*random.integers(5, VOCAB, count).tolist())
        start = time.perf_counter()
        if llama.llama_decode(context, llama.llama_batch_get_one(ids, count)):
            raise SystemExit("llama_decode failed")
        llama.llama_synchronize(context)
        # The outcome is looked at, or it might be computed later.
        ctypes.cast(llama.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))[0]
        return time.perf_counter() - start

    run(prompt)
    first = time.perf_counter() - began
    seconds = [run(1) for _ in range(tokens)][8:]
    rate, middle = len(seconds) / sum(seconds), 1 / sorted(seconds)[len(seconds) // 2]
    print(f"llama.cpp: {rate:.2f} tok/s (median {middle:.2f}), first token after {first:.1f} s")


if __name__ == "__main__":
    command, file, *numbers = sys.argv[1:]
    {"make": make, "bench": bench}[command](file, *map(int, numbers))
