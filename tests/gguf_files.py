"""Writes a Hugging Face checkpoint as GGUF, as llama.cpp's converter does, with the package gguf.

The package knows the names of tensors. What it does not know is here: the order of rotated pairs,
stacks of experts, and the keys of the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tiny_tokenizer import metadata as tokenizer

ARCHITECTURES = {
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "granitemoe": gguf.MODEL_ARCH.GRANITE_MOE,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "ernie4_5_moe": gguf.MODEL_ARCH.ERNIE4_5_MOE,
    "dots1": gguf.MODEL_ARCH.DOTS1,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2,
    **dict.fromkeys(("glm4_moe_lite", "deepseek_v2", "deepseek_v3"), gguf.MODEL_ARCH.DEEPSEEK2),
}
Weights = dict[str, torch.Tensor]


def read(checkpoint: Path) -> tuple[dict[str, Any], Weights]:
    """Return a checkpoint's config.json and tensors."""
    from safetensors.torch import load_file

    tensors: Weights = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(path)
    return json.loads((checkpoint / "config.json").read_text()), tensors


def tensors_of(config: Mapping[str, Any], weights: Weights) -> Weights:
    """Return the tensors with llama.cpp's names, shapes and order of rows."""
    kind = config["model_type"]
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], config["num_hidden_layers"])
    found: Weights = {}
    for name, weight in _heads_apart(config, _unstacked(kind, weights)):
        plain = name.replace("correction_bias", "correction.bias")
        plain = f"{plain}.weight" if plain.endswith("sinks") else plain
        own = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        if kind in ("mixtral", "granitemoe") and (".attn_q." in own or ".attn_k." in own):
            heads = "num_attention_heads" if ".attn_q." in own else "num_key_value_heads"
            weight = _neighbours(weight, config[heads])
        found[own] = weight.squeeze(0) if "inp_shexp" in own or "exp_probs" in own else weight
    return found


def _heads_apart(
    config: Mapping[str, Any], named: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors, those that heads make keys and values with in two stacks."""
    for name, weight in named:
        # Files of DeepSeek-V2 are older than these stacks.
        if not name.endswith("kv_b_proj.weight") or config["model_type"] == "deepseek_v2":
            yield name, weight
            continue
        heads = weight.view(config["num_attention_heads"], -1, weight.shape[1])
        keys, values = heads.split([config["qk_nope_head_dim"], config["v_head_dim"]], dim=1)
        yield name.replace("kv_b_proj", "k_b_proj"), keys.transpose(1, 2).contiguous()
        yield name.replace("kv_b_proj", "v_b_proj"), values.contiguous()


def _neighbours(weight: torch.Tensor, heads: int) -> torch.Tensor:
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(weight.shape)


def _unstacked(kind: str, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors, those of experts in stacks of one matrix each."""
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, weight in weights.items():
        prefix, _, rest = name.partition(".experts.")
        number, _, matrix = rest.partition(".")
        if number.isdecimal():
            own = matrix.split(".")[0]
            experts.setdefault(f"{prefix}.experts.{own}.weight", {})[int(number)] = weight
        elif kind == "granitemoe" and name.endswith("input_linear.weight"):
            moe = name.removesuffix("block_sparse_moe.input_linear.weight") + "mlp.experts."
            gate, up = weight.chunk(2, dim=1)
            yield from ((f"{moe}gate_proj.weight", gate), (f"{moe}up_proj.weight", up))
        elif kind == "gpt_oss" and ".experts." in name:
            yield from _of_gpt_oss(name, weight)
        else:
            yield name, weight
    for name, matrices in experts.items():
        yield name, torch.stack([matrices[number] for number in sorted(matrices)])


def _of_gpt_oss(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    own = name.removesuffix("_bias")
    kind = "bias" if name.endswith("_bias") else "weight"
    turned = weight if kind == "bias" else weight.transpose(1, 2)
    if "gate_up" in own:
        for part, start in (("gate", 0), ("up", 1)):
            yield own.replace("gate_up_proj", f"{part}_proj.{kind}"), turned[:, start::2]
    else:
        yield f"{own}.{kind}", turned


def through(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """Return what is left of weights [..., C] after they were quantized."""
    number = gguf.GGMLQuantizationType[kind]
    rows = weight.float().contiguous().numpy()
    return torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(rows, number), number)))


def rounded(checkpoint: Path, target: Path, kind: str) -> Path:
    """Write a copy of a checkpoint with the weights that a GGUF of this kind has, in bf16."""
    from safetensors.torch import save_file

    config, weights = read(checkpoint)
    made = {}
    for name, weight in weights.items():
        turned = config["model_type"] == "gpt_oss" and weight.dim() == 3
        if _is_quantized(name, weight):
            weight = weight.transpose(1, 2) if turned else weight
            weight = through(weight, kind)
            weight = weight.transpose(1, 2).contiguous() if turned else weight
        made[name] = weight.to(torch.bfloat16)
    target.mkdir()
    save_file(made, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config))
    return target


def published(checkpoint: Path, target: Path) -> Path:
    """Write a copy of a gpt-oss with its experts in MXFP4 as gguf rounds them, and all in bf16."""
    from safetensors.torch import save_file

    config, weights = read(rounded(checkpoint, target, "MXFP4"))
    number = gguf.GGMLQuantizationType.MXFP4
    for name, weight in read(checkpoint)[1].items():
        if weight.dim() < 3:
            continue
        rows = weight.transpose(1, 2).float().contiguous().numpy()
        blocks = gguf.quantize(rows, number).reshape(*rows.shape[:2], -1, 17)
        # The low nibbles have the first half of a block, the high ones the second half.
        codes = np.concatenate((blocks[..., 1:] & 0xF, blocks[..., 1:] >> 4), axis=-1)
        del weights[name]
        weights[f"{name}_blocks"] = torch.from_numpy(codes[..., ::2] | codes[..., 1::2] << 4)
        weights[f"{name}_scales"] = torch.from_numpy(blocks[..., 0].copy())
    save_file(weights, target / "model.safetensors")
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (target / "config.json").write_text(json.dumps(config))
    return target


def write(
    checkpoint: Path, path: Path, kind: str = "F32", *, separate: bool = False, parts: int = 1
) -> Path:
    """Write a checkpoint to a GGUF file, or to several parts beside it.

    `separate`: without stacks, as old files of Mixtrals.
    """
    config, weights = read(checkpoint)
    found = tensors_of(config, weights)
    if separate:
        for name in [name for name in found if "_exps" in name]:
            for number, weight in enumerate(found.pop(name)):
                found[name.replace("_exps", f".{number}")] = weight
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, config, found, kind, -(-len(found) // parts) if parts > 1 else 0)
    return path


def write_tensors(
    path: Path, config: Mapping[str, Any], tensors: Weights, kind: str, most: int = 0
) -> None:
    """Write a GGUF file with these tensors, the large ones quantized, `most` in each part."""
    name = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config["model_type"]]]
    writer = gguf.GGUFWriter(path, name, split_max_tensors=most)
    for key, value in {**metadata_of(config, name), **tokenizer()}.items():
        add_value(writer, key, value)
    number = gguf.GGMLQuantizationType[kind]
    for own, weight in tensors.items():
        values = weight.float().contiguous().numpy()
        if _is_quantized(own, weight):
            writer.add_tensor(own, gguf.quantize(values, number), raw_dtype=number)
        else:
            writer.add_tensor(own, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata_of(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the metadata of a config.json, as llama.cpp's converter writes it."""
    keys: dict[str, tuple[str, ...]] = {
        "block_count": ("num_hidden_layers",),
        "context_length": ("max_position_embeddings",),
        "embedding_length": ("hidden_size",),
        "feed_forward_length": ("intermediate_size",),
        "attention.head_count": ("num_attention_heads",),
        "attention.head_count_kv": ("num_key_value_heads",),
        "attention.key_length": ("head_dim",),
        "attention.value_length": ("head_dim",),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
        "attention.sliding_window": ("sliding_window",),
        "attention.clamp_kqv": ("clip_qkv",),
        "attention.scale": ("attention_multiplier",),
        "embedding_scale": ("embedding_multiplier",),
        "residual_scale": ("residual_multiplier",),
        "logit_scale": ("logits_scaling",),
        "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        "expert_used_count": ("num_experts_per_tok", "moe_k"),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
        "expert_shared_count": ("n_shared_experts", "moe_num_shared_experts"),
        "expert_weights_scale": ("routed_scaling_factor",),
        "leading_dense_block_count": ("first_k_dense_replace", "moe_layer_start_index"),
    }
    found = {theirs: config[key] for theirs, own in keys.items() for key in own if config.get(key)}
    if "kv_lora_rank" in config:
        found |= _of_latents(config)
    if config["model_type"] in ("dots1", "glm4_moe", "minimax_m2", "glm4_moe_lite", "deepseek_v3"):
        normalized = bool(config.get("norm_topk_prob", True))
        found |= {"expert_gating_func": 2, "expert_weights_norm": normalized}
    if config["model_type"] == "gpt_oss":
        found["expert_feed_forward_length"] = config["intermediate_size"]
    if config["model_type"] == "ernie4_5_moe":
        found["interleave_moe_layer_step"] = 1
        inner = config["moe_intermediate_size"] * config["moe_num_shared_experts"]
        found["expert_shared_feed_forward_length"] = inner
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 1e6)}
    found["rope.freq_base"] = float(rope["rope_theta"])
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    head = (
        config.get("qk_rope_head_dim")
        or config.get("head_dim")
        or config["hidden_size"] // config["num_attention_heads"]
    )
    found["rope.dimension_count"] = int(head * rotated)
    if rope.get("rope_type") == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
        if "mscale_all_dim" in rope:
            found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return {f"{name}.{key}": value for key, value in found.items()}


def _of_latents(config: Mapping[str, Any]) -> dict[str, Any]:
    kept, rotated = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    found = {
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "attention.head_count_kv": 1,
        "attention.key_length": config["kv_lora_rank"] + rotated,
        "attention.value_length": config["kv_lora_rank"],
        "attention.key_length_mla": kept + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "leading_dense_block_count": config.get("first_k_dense_replace", 1),
        "nextn_predict_layers": 0,
    }
    if config["model_type"] == "deepseek_v2":
        heads = config["num_attention_heads"]
        found |= {
            "attention.head_count_kv": heads,
            "attention.key_length": kept + rotated,
            "attention.value_length": config["v_head_dim"],
            "expert_gating_func": 1,
        }
        del found["attention.key_length_mla"], found["attention.value_length_mla"]
    if config.get("q_lora_rank"):
        found["attention.q_lora_rank"] = config["q_lora_rank"]
    return found


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a value of the metadata, with ggml's type for it."""
    kinds = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    kinds[type(value)](key, value)


def _is_quantized(name: str, weight: torch.Tensor) -> bool:
    routers = ("gate.weight", "router", "gate_inp", "bias")
    return weight.dim() > 1 and not any(router in name for router in routers)
