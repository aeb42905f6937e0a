"""llama.cpp on real layer shapes: a program of its own, for the Python that has it.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python==0.3.36 gguf     (compiles a while)
    python peer_child.py make FILE.gguf LAYERS [FORMAT] [--shape NAME]    Q4_0, Q4_K_M, ...
    python peer_child.py bench FILE.gguf PROMPT TOKENS
    python peer_child.py serve FILE.gguf CONTEXT GPU_LAYERS KV_BITS

It imports only the shapes of mixchat, which need nothing else. A layer takes 0.8 GB in Mixtral's
shapes in Q4_0. The weights are random like those of `mixchat/bench/synthetic.py`: a large embedding
to which each layer adds little, so that tokens look different to the routers and go to experts
evenly. They are written in Q4_0, as llama-quantize makes it: with more bits for the head, and with
eight experts for keys and values. gpt-oss has experts in MXFP4 and all else in Q8_0, as its files
are published. From there llama.cpp itself takes them to another format, for which the disk has to
hold both.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from llama_formats import FORMATS, requantize

sys.path.append(str(Path(__file__).parents[2]))
from mixchat.base.model_config import ModelConfig
from mixchat.install.known_models import KNOWN
from mixchat.weights.families.read_config import read_config

ARCHITECTURES = {
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe": "qwen35moe",
    "lfm2_moe": "lfm2moe",
    "glm4_moe_lite": "deepseek2",
    "gemma4": "gemma4",
}
SHAPES = [name for name, known in KNOWN.items() if known.config["model_type"] in ARCHITECTURES]
VOCAB = 32000  # tokens that every model has
LARGE, SMALL = 0.22, 0.00014  # scales of blocks: weights of 1, and of 0.0006 in the mean
PIECE = 2**24  # weights that are written at once
SEQUENCES = 8  # at once, at most
_PASS = 2048  # tokens that are computed in one pass, at most
_COMPUTED = 512  # tokens of a context, at most. The others are copies
_KV_TYPES = {16: 1, 8: 8}  # F16 and Q8_0 among ggml's types
_ALL_LAYERS = 999  # more than any model has; not all versions of llama.cpp take -1 for it

Tensor = tuple[str, tuple[int, ...], float, str]  # name, shape, scale of its blocks, type

# Weights of a block, its bytes, where its scale is (16 bits), and the spread of what it scales,
# beside that of Q4_0.
BLOCKS = {"Q4_0": (32, 18, 0, 1), "Q8_0": (32, 34, 0, 16), "Q6_K": (256, 210, 208, 4)}
BLOCKS |= {"MXFP4": (32, 17, 0, 1)}  # whose scale is one byte, the exponent of a power of two
MXFP4_EXPONENT = 115  # of 2^-12, with which weights spread as in Q4_0 with `SMALL`


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """All tensors of a file in Q4_0."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    dense, is_lfm2 = dense_type(config), config.model_type == "lfm2_moe"
    head = "Q6_K" if dense == "Q4_0" and hidden % BLOCKS["Q6_K"][0] == 0 else "Q8_0"
    tied = config.tie_word_embeddings
    yield "token_embd.weight", (vocabulary, hidden), LARGE, head if tied else dense
    yield f"{'token_embd' if is_lfm2 else 'output'}_norm.weight", (hidden,), 0, "F32"
    if not tied:
        yield "output.weight", (vocabulary, hidden), SMALL, head
    if config.global_head_dim:  # divides the frequencies of wide heads
        yield "rope_freqs.weight", (config.global_head_dim // 2,), 0, "F32"
    has_other = config.attention_sinks or config.attn_output_gate
    for layer in range(config.num_hidden_layers):
        block = f"blk.{layer}."
        after = "post_attention_norm" if has_other else "ffn_norm"
        yield f"{block}attn_norm.weight", (hidden,), 0, "F32"
        yield f"{block}{after}.weight", (hidden,), 0, "F32"
        yield from MIXERS[config.mixer(layer)](config, block)
        if config.sandwich_norms:
            for name in OUTPUT_NORMS:
                yield f"{block}{name}.weight", (hidden,), 0, "F32"
            yield f"{block}layer_output_scale.weight", (1,), 0, "F32"
        is_sparse = layer >= config.first_k_dense_replace
        if is_sparse:
            yield from experts(config, f"{block}ffn_")
        if inner := config.mlp_intermediate_size(layer):
            suffix = "_shexp" if is_sparse and not config.sandwich_norms else ""
            yield f"{block}ffn_gate{suffix}.weight", (inner, hidden), SMALL, dense
            yield f"{block}ffn_up{suffix}.weight", (inner, hidden), SMALL, dense
            yield f"{block}ffn_down{suffix}.weight", (hidden, inner), SMALL, dense
        if is_sparse and config.shared_expert_gate:
            yield f"{block}ffn_gate_inp_shexp.weight", (hidden,), 0, "F32"
        if is_sparse and config.e_score_correction_bias:
            yield f"{block}exp_probs_b.bias", (config.num_local_experts,), 0, "F32"


def dense_type(config: ModelConfig) -> str:
    """The type of all matrices but experts and head."""
    return "Q8_0" if config.moe_bias else "Q4_0"


OUTPUT_NORMS = (
    *("post_attention_norm", "post_ffw_norm", "post_ffw_norm_1"),
    *("pre_ffw_norm_2", "post_ffw_norm_2"),
)


def attention(config: ModelConfig, block: str) -> Iterator[Tensor]:
    prefix, layer, hidden = f"{block}attn_", int(block.split(".")[1]), config.hidden_size
    count, groups, width = config.attention_shape(layer)
    heads, groups = count * width, groups * width
    dense = dense_type(config)
    few = "Q8_0" if config.num_local_experts == 8 else dense
    for name, rows, columns, kind in (
        ("q", heads * (2 if config.attn_output_gate else 1), hidden, dense),
        ("k", groups, hidden, few),
        ("v", groups, hidden, few),
        ("output", hidden, heads, dense),
    ):
        if name == "v" and config.values_are_keys(layer):
            continue
        yield f"{prefix}{name}.weight", (rows, columns), SMALL, kind
        if config.attention_bias:
            yield f"{prefix}{name}.bias", (rows,), 0, "F32"
    if config.qk_norm:  # of each head
        yield f"{prefix}q_norm.weight", (width,), 0, "F32"
        yield f"{prefix}k_norm.weight", (width,), 0, "F32"
    if config.attention_sinks:
        yield f"{prefix}sinks.weight", (config.num_attention_heads,), 0, "F32"


def latent_attention(config: ModelConfig, block: str) -> Iterator[Tensor]:
    prefix = f"{block}attn_"
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    kept, rotated, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    for name, shape in (
        ("q_a", (config.q_lora_rank, hidden)),
        ("q_b", (heads * (kept + rotated), config.q_lora_rank)),
        ("kv_a_mqa", (latent + rotated, hidden)),
        ("k_b", (heads, latent, kept)),
        ("v_b", (heads, value, latent)),
        ("output", (hidden, heads * value)),
    ):
        yield f"{prefix}{name}.weight", shape, SMALL, dense_type(config)
    yield f"{prefix}q_a_norm.weight", (config.q_lora_rank,), 0, "F32"
    yield f"{prefix}kv_a_norm.weight", (latent,), 0, "F32"


def delta_net(config: ModelConfig, block: str) -> Iterator[Tensor]:
    hidden, (keys, heads, key, value) = config.hidden_size, config.delta_net_shape
    channels, values, dense = 2 * keys * key + heads * value, heads * value, dense_type(config)
    yield f"{block}attn_qkv.weight", (channels, hidden), SMALL, dense
    yield f"{block}attn_gate.weight", (values, hidden), SMALL, dense
    small = {"ssm_ba": 2 * heads}
    if config.model_type == "qwen3_5_moe":
        small = {"ssm_beta": heads, "ssm_alpha": heads}
    for name, rows in small.items():
        yield f"{block}{name}.weight", (rows, hidden), SMALL, "Q8_0"
    yield f"{block}ssm_conv1d.weight", (channels, config.linear_conv_kernel_dim), 0, "F32"
    yield f"{block}ssm_dt.bias", (heads,), 0, "F32"
    yield f"{block}ssm_a", (heads,), 0, "F32"
    yield f"{block}ssm_norm.weight", (value,), 0, "F32"
    yield f"{block}ssm_out.weight", (hidden, values), SMALL, dense


def short_conv(config: ModelConfig, block: str) -> Iterator[Tensor]:
    hidden, dense, prefix = config.hidden_size, dense_type(config), f"{block}shortconv."
    yield f"{prefix}in_proj.weight", (3 * hidden, hidden), SMALL, dense
    yield f"{prefix}conv.weight", (hidden, config.conv_L_cache), 0, "F32"
    yield f"{prefix}out_proj.weight", (hidden, hidden), SMALL, dense


MIXERS = {
    "attention": attention,
    "latent_attention": latent_attention,
    "linear_attention": delta_net,
    "conv": short_conv,
}


def experts(config: ModelConfig, prefix: str) -> Iterator[Tensor]:
    hidden, inner, count = config.hidden_size, config.intermediate_size, config.num_local_experts
    kind = "MXFP4" if config.moe_bias else "Q4_0"
    yield f"{prefix}gate_inp.weight", (count, hidden), 0, "F32"
    if config.moe_bias:
        yield f"{prefix}gate_inp.bias", (count,), 0, "F32"
    if config.per_expert_scale:
        yield f"{prefix}gate_inp.scale", (hidden,), 0, "F32"
        yield f"{prefix}down_exps.scale", (count,), 0, "F32"
    gate_and_up = [("gate", inner, hidden), ("up", inner, hidden)]
    if config.sandwich_norms:  # as Gemma 4's files have them, and as ik_llama.cpp wants them
        gate_and_up = [("gate_up", 2 * inner, hidden)]
    for name, rows, columns in (*gate_and_up, ("down", hidden, inner)):
        yield f"{prefix}{name}_exps.weight", (count, rows, columns), SMALL, kind
        if config.moe_bias:
            yield f"{prefix}{name}_exps.bias", (count, rows), 0, "F32"


def make(path: Path, layers: int, format: str, shape: str = "instruct") -> None:
    """Write a model of so many layers."""
    if format == "Q4_0":
        write_q4_0(path, layers, shape)
        return
    plain = path.with_name(f"{path.name}.Q4_0")
    try:
        write_q4_0(plain, layers, shape)
        requantize(plain, path, format)
    finally:
        plain.unlink(missing_ok=True)


def write_q4_0(path: Path, layers: int, shape: str = "instruct") -> None:
    """Write a model of so many layers in Q4_0."""
    import gguf

    config = read_config(KNOWN[shape].with_layers(layers))
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type])
    _add_keys(writer, config)
    for name, shape, _, kind in tensors(config):
        raw = shape if kind == "F32" else _raw_shape(shape, kind)
        dtype = np.dtype(np.float32 if kind == "F32" else np.uint8)
        size = prod(raw) * dtype.itemsize
        writer.add_tensor_info(name, raw, dtype, size, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for name, shape, scale, kind in tensors(config):
        if kind != "F32":
            writer.write_tensor_data(_blocks(random, shape, scale, kind))
        elif name == "rope_freqs.weight":
            turning = np.arange(shape[0]) < shape[0] // 4
            writer.write_tensor_data(np.where(turning, 1, 1e30).astype(np.float32))
        elif "norm" in name or "scale" in name:
            writer.write_tensor_data(np.ones(shape, np.float32))
        elif name.endswith("ssm_a"):  # a decay needs a negative number
            writer.write_tensor_data(-np.ones(shape, np.float32))
        else:
            writer.write_tensor_data(0.02 * random.standard_normal(shape, np.float32))
    writer.close()


def _add_keys(writer: Any, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    beside = config.shared_expert_intermediate_size if config.sandwich_norms else 0
    inner = config.dense_intermediate_size or beside or config.intermediate_size
    writer.add_feed_forward_length(inner)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if config.kv_lora_rank:
        _add_keys_of_latents(writer, config)
    elif config.global_head_dim:
        _add_keys_of_wide_heads(writer, config)
    else:
        mixers = map(config.mixer, range(config.num_hidden_layers))
        groups = [config.num_key_value_heads * (mixer != "conv") for mixer in mixers]
        writer.add_head_count_kv(groups if 0 in groups else groups[0])
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        partial = config.rope_parameters.partial_rotary_factor
        writer.add_rope_dimension_count(int(config.head_dim * partial))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.rope_theta)
    if rope.rope_type == "yarn":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position_embeddings)
    _add_keys_of_states(writer, config)
    if config.sliding_window is not None:  # of every other layer, as llama.cpp assumes
        writer.add_sliding_window(config.sliding_window)


def _add_keys_of_wide_heads(writer: Any, config: ModelConfig) -> None:
    """Add what belongs to Gemma 4, whose heads without a window are wider."""
    layers = range(config.num_hidden_layers)
    writer.add_sliding_window_pattern([config.window(layer) is not None for layer in layers])
    writer.add_head_count_kv([config.attention_shape(layer)[1] for layer in layers])
    for width, add in (
        (config.global_head_dim, (writer.add_key_length, writer.add_value_length)),
        (config.head_dim, (writer.add_key_length_swa, writer.add_value_length_swa)),
    ):
        for each in add:
            each(width)
    writer.add_rope_dimension_count(config.global_head_dim)
    writer.add_rope_dimension_count_swa(config.head_dim)
    writer.add_rope_freq_base_swa(config.rope(0).rope_theta)
    writer.add_shared_kv_layers(0)
    writer.add_embedding_length_per_layer_input(0)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_keys_of_latents(writer: Any, config: ModelConfig) -> None:
    import gguf

    kept, rotated = config.qk_nope_head_dim, config.qk_rope_head_dim
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + rotated)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(kept + rotated)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(rotated)
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    shared = config.shared_expert_intermediate_size // config.intermediate_size
    writer.add_expert_shared_count(shared)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _add_keys_of_states(writer: Any, config: ModelConfig) -> None:
    """Add what belongs to DeltaNets, or to short convolutions."""
    if "linear_attention" in config.layer_types:
        keys, heads, key, value = config.delta_net_shape
        writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
        writer.add_ssm_inner_size(heads * value)
        writer.add_ssm_state_size(key)
        writer.add_ssm_time_step_rank(heads)
        writer.add_ssm_group_count(keys)
        writer.add_full_attention_interval(4)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if config.model_type == "qwen3_5_moe":
        writer.add_rope_dimension_sections([11, 11, 10, 0])
    if "conv" in config.layer_types:
        import gguf

        writer.add_shortconv_l_cache(config.conv_L_cache)
        writer.add_leading_dense_block_count(config.first_k_dense_replace)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def _blocks(
    random: np.random.Generator, shape: tuple[int, ...], scale: float, kind: str
) -> np.ndarray:
    """Blocks of a type with random codes, whose weights spread as those of Q4_0 with `scale`."""
    weights, size, place, spread = BLOCKS[kind]
    blocks = random.integers(0, 256, (prod(shape) // weights, size), dtype=np.uint8)
    if kind == "MXFP4":
        blocks[:, place] = MXFP4_EXPONENT
    else:
        blocks[:, place : place + 2] = np.frombuffer(np.float16(scale / spread).tobytes(), np.uint8)
    if kind == "Q6_K":
        blocks[:, place - 16 : place] = 1  # scales of 16 weights each
    return blocks.reshape(_raw_shape(shape, kind))


def _raw_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """The shape in bytes."""
    weights, size, *_ = BLOCKS[kind]
    return *shape[:-1], shape[-1] // weights * size


class Llama:
    """A model in llama.cpp, with a context that is cut back for each measurement.

    `repack`: the weights are copied into the order that its kernels like best, which takes all of
    them in memory; without, they stay in the mapped file, as they must where it is larger.
    `gpu_layers`: those that a GPU computes, -1 for all.
    """

    def __init__(
        self, path: Path, context: int, repack: bool, gpu_layers: int = 0, kv_bits: int = 16
    ) -> None:
        import llama_cpp

        self._llama = llama_cpp
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = repack
        options.n_gpu_layers = gpu_layers if gpu_layers >= 0 else _ALL_LAYERS
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, _PASS, 512
        params.type_k = params.type_v = _KV_TYPES[kv_bits]
        params.n_seq_max, params.kv_unified = SEQUENCES, True
        params.n_threads = params.n_threads_batch = os.cpu_count() or 2
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._random = np.random.default_rng(1)
        self._held = 0  # tokens of the first sequence, -1 if other sequences have some
        self._states: dict[int, Any] = {}  # the bytes of so many computed tokens

    def begin(self, context: int) -> None:
        """Hold so many random tokens, or a few more.

        Many tokens are some that are computed, and copies of these at the same positions. Computing
        each would take minutes, and the next token attends to a copy as to any other token.
        """
        llama, model = self._llama, self._context
        memory = llama.llama_get_memory(model)
        copies = max(1, -(-context // _COMPUTED))
        computed = -(-context // copies)
        if self._held == context and llama.llama_memory_seq_rm(memory, 0, computed, -1):
            return
        llama.llama_memory_clear(memory, True)
        self._held = context
        if copies == 1:
            self.run(computed)
            return
        if computed not in self._states:
            self.run(computed)
            size = llama.llama_state_seq_get_size(model, 0)
            state = self._states[computed] = (ctypes.c_uint8 * size)()
            llama.llama_state_seq_get_data(model, state, size, 0)
            llama.llama_memory_clear(memory, True)
        state = self._states[computed]
        for _ in range(copies):
            if not llama.llama_state_seq_set_data(model, state, len(state), 1):
                raise SystemExit("llama_state_seq_set_data failed")
            llama.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            llama.llama_memory_seq_rm(memory, 1, -1, -1)

    def run(self, count: int) -> float:
        """Seconds for so many random tokens behind those that are there."""
        llama, start = self._llama, time.perf_counter()
        while count:
            step = min(count, _PASS)
            ids = (llama.llama_token * step)(*self._random.integers(5, VOCAB, step).tolist())
            if llama.llama_decode(self._context, llama.llama_batch_get_one(ids, step)):
                raise SystemExit("llama_decode failed")
            count -= step
        llama.llama_synchronize(self._context)
        # The outcome is looked at, or it might be computed later.
        ctypes.cast(llama.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))[0]
        return time.perf_counter() - start

    def run_together(self, sequences: int, position: int) -> float:
        """Seconds for one random token more of so many sequences, in one pass."""
        llama, start = self._llama, time.perf_counter()
        self._held = -1
        batch = llama.llama_batch_init(sequences, 0, 1)
        batch.n_tokens = sequences
        for n, token in enumerate(self._random.integers(5, VOCAB, sequences).tolist()):
            batch.token[n], batch.pos[n], batch.logits[n] = token, position, True
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, n
        if llama.llama_decode(self._context, batch):
            raise SystemExit("llama_decode failed")
        llama.llama_synchronize(self._context)
        ctypes.cast(llama.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))[0]
        llama.llama_batch_free(batch)
        return time.perf_counter() - start


def bench(path: Path, prompt: int, tokens: int) -> None:
    """Print the rates of a prompt and of the tokens after it, each another random token."""
    began = time.perf_counter()
    model = Llama(path, prompt + tokens + 8, repack=False)
    model.run(prompt)
    first = time.perf_counter() - began
    seconds = [model.run(1) for _ in range(tokens)][8:]
    rate, middle = len(seconds) / sum(seconds), 1 / sorted(seconds)[len(seconds) // 2]
    print(f"llama.cpp: {rate:.2f} tok/s (median {middle:.2f}), first token after {first:.1f} s")


def serve(path: Path, context: int, gpu_layers: int, kv_bits: int) -> None:
    """Measure what the lines of standard input ask for: "CONTEXT: COUNT COUNT ..." are the tokens
    of one pass each, behind so many; "NxPASSES" are passes of one token each of N sequences. Prints
    the seconds of each pass in a line."""
    output = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # llama.cpp may print
    model = Llama(path, context, True, gpu_layers, kv_bits)
    print("ready", file=output)
    for line in sys.stdin:
        if "x" in line:
            model.begin(0)
            sequences, passes = map(int, line.split("x"))
            seconds = [model.run_together(sequences, n) for n in range(passes)]
        else:
            context, counts = line.split(":")
            model.begin(int(context))
            seconds = [model.run(int(count)) for count in counts.split()]
        print(*seconds, file=output)


COMMANDS: dict[Callable[..., None], tuple[str, ...]] = {
    make: ("layers",),
    bench: ("prompt", "tokens"),
    serve: ("context", "gpu_layers", "kv_bits"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for command, numbers in COMMANDS.items():
        arguments = commands.add_parser(command.__name__)
        arguments.set_defaults(command=command)
        arguments.add_argument("path", type=Path, metavar="FILE.gguf")
        for number in numbers:
            arguments.add_argument(number, type=int, metavar=number.upper())
        if command is make:
            arguments.add_argument("format", nargs="?", choices=FORMATS, default="Q4_0")
            arguments.add_argument("--shape", choices=SHAPES, default="instruct")
    given = vars(parser.parse_args())
    given.pop("command")(**given)


if __name__ == "__main__":
    main()
