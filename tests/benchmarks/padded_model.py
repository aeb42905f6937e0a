"""The demo's dense model, in a shape and with weights that are fair to every format.

Its hidden size of 576 is no multiple of 256, the block of llama.cpp's K-quants, which fall back to
larger types there. `padded` adds heads of zeros up to 768. What the model computes stays the same:

- a residual stream x of 576 becomes (x, 0), because all rows that write to the rest are zeros;
- the mean square over 768 is 576/768 of the one over 576, so the norms' weights are multiplied by
  sqrt(576/768) and epsilon by 576/768;
- the added heads have queries, keys and values of zero.

Its weights come from a file in 4 bits and lie on that file's 16 levels a block, which some formats
meet again exactly. `rescaled` takes them off these levels, and leaves the function as it is, too: a
channel that a norm puts out is divided by a factor in the norm's weights and multiplied by it in
the matrices that read it. The same is done between v and the output of attention, and between up
and down.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize

SEED = 0
SPREAD = 0.2  # factors of channels lie between exp(-SPREAD) and exp(SPREAD)
Floats = npt.NDArray[np.float32]
Tensors = dict[str, Floats]


def dense_tensors(gguf: Path) -> Tensors:
    """Return the tensors of a Llama in fp32, [out, in], with a head of its own."""
    tensors: Tensors = {
        one.name.removesuffix(".weight"): np.array(
            dequantize(one.data, one.tensor_type), dtype=np.float32
        )
        for one in GGUFReader(gguf).tensors
    }
    tensors.setdefault("output", tensors["token_embd"])
    return tensors


def padded_config(config: dict[str, Any], hidden: int) -> dict[str, Any]:
    """Return a config.json with a hidden size of `hidden`, and heads to match."""
    old, heads = config["hidden_size"], hidden // config["head_dim"]
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    if hidden % (config["head_dim"] * group):
        raise ValueError(f"{hidden} is no multiple of {group} heads of {config['head_dim']}")
    return config | {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // group,
        "rms_norm_eps": config["rms_norm_eps"] * old / hidden,
    }


def padded(tensors: Tensors, hidden: int) -> Tensors:
    """Return the tensors of the same function with a hidden size of `hidden`."""
    old, kv_rows = tensors["output_norm"].size, len(tensors["blk.0.attn_k"])
    sizes = {old: hidden, kv_rows: kv_rows * hidden // old}

    def pad(name: str, tensor: Floats) -> Floats:
        factor = (old / hidden) ** 0.5 if name.endswith("norm") else 1
        more = [(0, sizes.get(size, size) - size) for size in tensor.shape]
        return np.pad(tensor * np.float32(factor), more)

    return {name: pad(name, tensor) for name, tensor in tensors.items()}


def rescaled(tensors: Tensors, head_dim: int) -> Tensors:
    """Return the tensors of the same function with other weights, as the module's text says."""
    random, made = np.random.RandomState(SEED), dict(tensors)

    def factors(size: int) -> Floats:
        return np.exp(random.uniform(-SPREAD, SPREAD, size)).astype(np.float32)

    def behind_norm(norm: str, readers: list[str]) -> None:
        by = factors(tensors[norm].size)
        made[norm] = tensors[norm] / by
        made.update({name: tensors[name] * by for name in readers})

    def between(writer: str, reader: str) -> None:
        by = factors(len(tensors[writer])).reshape(-1, head_dim)
        times = tensors[reader].shape[1] // by.size
        made[writer] = made[writer] * by.reshape(-1, 1)
        made[reader] = tensors[reader] / np.repeat(by, times, axis=0).reshape(-1)

    behind_norm("output_norm", ["output"])
    for layer in range(sum(name.endswith(".attn_norm") for name in tensors)):
        blk = f"blk.{layer}."
        behind_norm(f"{blk}attn_norm", [f"{blk}attn_{name}" for name in "qkv"])
        behind_norm(f"{blk}ffn_norm", [f"{blk}ffn_gate", f"{blk}ffn_up"])
        between(f"{blk}attn_v", f"{blk}attn_output")
        between(f"{blk}ffn_up", f"{blk}ffn_down")
    return made


def two_experts(tensors: Tensors) -> Tensors:
    """Return the tensors of the same function as a mixture of two equal experts."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        block, _, part = name.rpartition(".")
        if part in ("ffn_gate", "ffn_up", "ffn_down"):
            made[f"{name}_exps"] = np.stack([tensor, tensor])
        else:
            made[name] = tensor
        if part == "ffn_norm":
            made[f"{block}.ffn_gate_inp"] = np.zeros((2, tensor.size), dtype=np.float32)
    return made


def write_gguf(source: Path, target: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    """Write tensors in fp32, with the metadata of `source` but for what `config` says.

    With the stacks of `two_experts` it is a mixture, whose tokens choose both.
    """
    changed = {
        "llama.embedding_length": config["hidden_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
    }
    writer = GGUFWriter(target, "llama")
    for key, one in GGUFReader(source).fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        inner = one.types[-1] if one.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, changed.get(key, one.contents()), one.types[0], sub_type=inner)
    if any(name.endswith("_exps") for name in tensors):
        writer.add_expert_count(2)
        writer.add_expert_used_count(2)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
