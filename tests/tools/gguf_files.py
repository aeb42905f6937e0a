"""Writes a Hugging Face checkpoint as GGUF, as llama.cpp's converter does, with the package gguf.

The package knows the names of tensors. What it does not know is here: the order of rotated pairs,
stacks of experts, and the keys of the metadata.
"""

from __future__ import annotations

import json
import re
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
    "granitemoehybrid": gguf.MODEL_ARCH.GRANITE_HYBRID,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "ernie4_5_moe": gguf.MODEL_ARCH.ERNIE4_5_MOE,
    "dots1": gguf.MODEL_ARCH.DOTS1,
    "glm4_moe": gguf.MODEL_ARCH.GLM4_MOE,
    "minimax_m2": gguf.MODEL_ARCH.MINIMAXM2,
    "qwen3_next": gguf.MODEL_ARCH.QWEN3NEXT,
    "qwen3_5_moe": gguf.MODEL_ARCH.QWEN35MOE,
    "glm4_moe_lite": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v2": gguf.MODEL_ARCH.DEEPSEEK2,
    "deepseek_v3": gguf.MODEL_ARCH.DEEPSEEK2,
    "mistral4": gguf.MODEL_ARCH.MISTRAL4,
    "lfm2_moe": gguf.MODEL_ARCH.LFM2MOE,
    "gemma4": gguf.MODEL_ARCH.GEMMA4,
}
Weights = dict[str, torch.Tensor]
_GEMMA_SCALE = re.compile(r"model\.layers\.(\d+)\.router\.(?:per_expert_)?scale")


def read(checkpoint: Path) -> tuple[dict[str, Any], Weights]:
    """Return a checkpoint's config.json and tensors."""
    from safetensors.torch import load_file

    tensors: Weights = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(path)
    return json.loads((checkpoint / "config.json").read_text()), tensors


def tensors_of(config: Mapping[str, Any], weights: Weights) -> Weights:
    """Return the tensors with llama.cpp's names, shapes and order of rows."""
    kind = family_of(config)
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], config["num_hidden_layers"])
    found: Weights = {}
    for name, weight in _moved(config, _unstacked(kind, weights)):
        plain = name.replace("correction_bias", "correction.bias")
        plain = f"{plain}.weight" if plain.endswith("sinks") else plain
        plain = plain.replace("expert_bias", "expert_bias.bias")
        if kind == "lfm2_moe" and ".experts." in plain:
            plain = plain.removeprefix("model.")
        if kind == "gemma4":
            plain = f"{plain}.weight" if plain.endswith("layer_scalar") else plain
            if (number := _GEMMA_SCALE.fullmatch(plain)) is not None:
                scaled = "ffn_down_exps" if "expert" in plain else "ffn_gate_inp"
                found[f"blk.{number[1]}.{scaled}.scale"] = weight
                continue
        own = names.get_name(plain, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        turned = kind in ("mixtral", "granitemoe", "granitemoehybrid")
        if turned and (".attn_q." in own or ".attn_k." in own):
            heads = "num_attention_heads" if ".attn_q." in own else "num_key_value_heads"
            weight = _neighbours(weight, config[heads])
        found[own] = weight.squeeze(0) if "inp_shexp" in own or "exp_probs" in own else weight
    if kind == "gemma4":
        # Of full layers. llama.cpp divides the angles of a pair by its number.
        full, rope = _full_heads(config), config["rope_parameters"]["full_attention"]
        rotated = int(full["head_dim"] * rope["partial_rotary_factor"] / 2)
        factors = torch.full((full["head_dim"] // 2,), 1e30)
        factors[:rotated] = 1
        found["rope_freqs.weight"] = factors
    return found


def _full_heads(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the shape of Gemma 4's heads in full layers."""
    shape: dict[str, int] = next(iter(config["per_layer_config"].values()))
    return shape


def family_of(config: Mapping[str, Any]) -> str:
    """Return the family of a config.json, which may be of a language model alone."""
    return str(config["model_type"]).removesuffix("_text")


def _moved(
    config: Mapping[str, Any], weights: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors whose values, rows or columns llama.cpp's converter changes, as it does."""
    kind = family_of(config)
    for name, weight in weights:
        if "linear_attn." in name or (kind in HYBRIDS and name.endswith("norm.weight")):
            yield from _of_hybrid(config, name, weight)
        elif ".mamba." in name:
            yield _of_mamba(config, name, weight)
        elif name.endswith("kv_b_proj.weight"):
            heads = weight.view(config["num_attention_heads"], -1, weight.shape[1])
            keys, values = heads.split([config["qk_nope_head_dim"], config["v_head_dim"]], dim=1)
            yield name.replace("kv_b_proj", "k_b_proj"), keys.transpose(1, 2)
            yield name.replace("kv_b_proj", "v_b_proj"), values
        else:
            yield name, weight.squeeze(1) if name.endswith("conv.conv.weight") else weight


def _of_mamba(
    config: Mapping[str, Any], name: str, weight: torch.Tensor
) -> tuple[str, torch.Tensor]:
    own = name.rpartition("mamba.")[2]
    if own == "A_log":
        return name, -weight.float().exp()[:, None]
    if own == "conv1d.weight":
        return name, weight.squeeze(1)
    if own == "norm.weight":
        return name, weight.view(config["mamba_n_groups"], -1)
    return name.replace("dt_bias", "dt_proj.bias"), weight[:, None] if own == "D" else weight


HYBRIDS = ("qwen3_next", "qwen3_5_moe")


def _of_hybrid(
    config: Mapping[str, Any], name: str, weight: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a tensor of Qwen3-Next or Qwen3.5."""
    keys, heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key, value, each = config["linear_key_head_dim"], config["linear_value_head_dim"], heads // keys
    own = name.rpartition("linear_attn.")[2]
    if own == "in_proj_qkvz.weight":
        widths = [key, key, each * value, each * value]
        parts = [x.flatten(0, 1) for x in weight.unflatten(0, (keys, -1)).split(widths, dim=1)]
        yield name.replace("qkvz", "qkv"), torch.cat(parts[:3])
        yield name.replace("qkvz", "z"), parts[3]
        return
    if family_of(config) == "qwen3_5_moe" and own != name:
        width = 1 if own in ("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight") else value
        start = 2 * keys * key if own in ("in_proj_qkv.weight", "conv1d.weight") else 0
        if own == "out_proj.weight":
            weight = _tiled(weight.T, 0, keys, each, width).T
        elif own != "norm.weight":
            weight = _tiled(weight, start, keys, each, width)
    if own == "A_log":
        weight = -weight.float().exp()
    elif own == "dt_bias":
        name = name.replace("dt_bias", "dt_proj.bias")
    elif own == "conv1d.weight":
        weight = weight.squeeze(1)
    elif own != "norm.weight" and name.endswith("norm.weight"):
        weight = weight + 1
    yield name, weight


def _tiled(weight: torch.Tensor, start: int, keys: int, each: int, width: int) -> torch.Tensor:
    """Put the rows of value heads from `start` on into the order of tiles."""
    values = weight[start:].unflatten(0, (keys, each, width)).transpose(0, 1).flatten(0, 2)
    return torch.cat((weight[:start], values))


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
        elif rest == "gate_up_proj" and kind == "gemma4":
            yield f"{name}.weight", weight
        elif rest == "gate_up_proj" and kind != "gpt_oss":
            gate, up = weight.chunk(2, dim=1)
            yield from (
                (f"{prefix}.experts.{x}_proj.weight", part)
                for x, part in (("gate", gate), ("up", up))
            )
        elif rest == "down_proj" and kind != "gpt_oss":
            yield f"{name}.weight", weight
        elif kind.startswith("granitemoe") and name.endswith("input_linear.weight"):
            own, is_shared = name.rsplit(".", 3)[0], "shared_mlp" in name
            moe = f"{own}.mlp.{'shared_expert' if is_shared else 'experts'}."
            gate, up = weight.chunk(2, dim=-2)
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
    checkpoint: Path,
    path: Path,
    kind: str = "F32",
    *,
    separate: bool = False,
    joined: bool = False,
    parts: int = 1,
) -> Path:
    """Write a checkpoint to a GGUF file, or to several parts beside it.

    `separate`: without stacks, as old files of Mixtrals. `joined`: with gate and up in one stack.
    """
    config, weights = read(checkpoint)
    found = tensors_of(config, weights)
    for name in [name for name in found if joined and "ffn_gate_exps" in name]:
        both = (found.pop(name), found.pop(name.replace("gate", "up")))
        found[name.replace("gate", "gate_up")] = torch.cat(both, dim=1)
    if separate:
        for name in [name for name in found if "_exps" in name]:
            for number, weight in enumerate(found.pop(name)):
                found[name.replace("_exps", f".{number}")] = weight
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, config, found, kind, -(-len(found) // parts) if parts > 1 else 0)
    return path


def write_tensors(
    path: Path,
    config: Mapping[str, Any],
    tensors: Weights,
    kind: str,
    most: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write a GGUF file with these tensors, the large ones quantized, `most` in each part.

    `changes` are of the metadata. None removes a value.
    """
    name = gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family_of(config)]]
    writer = gguf.GGUFWriter(path, name, split_max_tensors=most)
    values = {**metadata_of(config, name), **tokenizer(), **(changes or {})}
    for key, value in values.items():
        if value is not None:
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
        "attention.scale": ("attention_multiplier",),
        "embedding_scale": ("embedding_multiplier",),
        "residual_scale": ("residual_multiplier",),
        "logit_scale": ("logits_scaling",),
        "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        "expert_used_count": ("num_experts_per_tok", "moe_k"),
        "expert_feed_forward_length": ("moe_intermediate_size",),
        "expert_shared_feed_forward_length": (
            *("shared_expert_intermediate_size", "shared_intermediate_size"),
        ),
        "expert_shared_count": ("n_shared_experts", "moe_num_shared_experts"),
        "expert_weights_scale": ("routed_scaling_factor",),
        "leading_dense_block_count": (
            *("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
        ),
        "expert_group_count": ("n_group",),
        "expert_group_used_count": ("topk_group",),
        "attention.q_lora_rank": ("q_lora_rank",),
        "attention.kv_lora_rank": ("kv_lora_rank",),
        "shortconv.l_cache": ("conv_L_cache",),
        "ssm.conv_kernel": ("linear_conv_kernel_dim", "mamba_d_conv"),
        "ssm.state_size": ("linear_key_head_dim", "mamba_d_state"),
        "ssm.group_count": ("linear_num_key_heads", "mamba_n_groups"),
        "ssm.time_step_rank": ("linear_num_value_heads", "mamba_n_heads"),
    }
    found = {theirs: config[key] for theirs, own in keys.items() for key in own if config.get(key)}
    found |= _of_mixers(config)
    sigmoids = ("dots1", "glm4_moe", "glm4_moe_lite", "deepseek_v3", "minimax_m2", "lfm2_moe")
    if config["model_type"] in ("deepseek_v2", "mistral4"):
        found["expert_gating_func"] = 1
    if config["model_type"] in sigmoids:
        found["expert_gating_func"] = 2
    if config["model_type"] in (*sigmoids, "mistral4") and config.get("norm_topk_prob", True):
        found["expert_weights_norm"] = True
    if config["model_type"] in ("gpt_oss", "minimax_m2"):
        found["expert_feed_forward_length"] = config["intermediate_size"]
    if config["model_type"] == "ernie4_5_moe":
        found["interleave_moe_layer_step"] = 1
        inner = config["moe_intermediate_size"] * config["moe_num_shared_experts"]
        found["expert_shared_feed_forward_length"] = inner
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 1e6)}
    rope = rope.get("full_attention", rope)
    found["rope.freq_base"] = float(rope["rope_theta"])
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    found.setdefault("rope.dimension_count", config.get("qk_rope_head_dim") or int(head * rotated))
    if rope.get("rope_type") == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    if "llama_4_scaling_beta" in rope:
        found["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
        found["attention.temperature_length"] = rope["original_max_position_embeddings"]
    if "mscale_all_dim" in rope:
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return {f"{name}.{key}": value for key, value in found.items() if value is not None}


def _of_mixers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of other mixers than attention."""
    found: dict[str, Any] = {}
    if family_of(config) in HYBRIDS:
        found["ssm.inner_size"] = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        found["full_attention_interval"] = 1 + config["layer_types"].index("full_attention")
        found["rope.dimension_sections"] = [11, 11, 10, 0]  # for the tokens of an image alone
    if family_of(config) == "granitemoehybrid":
        heads = config["num_key_value_heads"]
        attends = ["attention" in x and "linear" not in x for x in config["layer_types"]]
        found["attention.head_count_kv"] = [heads if x else 0 for x in attends]
        found["ssm.inner_size"] = config["mamba_n_heads"] * config["mamba_d_head"]
        found["rope.scaling.finetuned"] = config["position_embedding_type"] == "rope"
    if config.get("kv_lora_rank"):
        rotated, latent = config["qk_rope_head_dim"], config["kv_lora_rank"]
        found |= {
            "attention.head_count_kv": 1,
            "attention.key_length": latent + rotated,
            "attention.value_length": latent,
            "attention.key_length_mla": config["qk_nope_head_dim"] + rotated,
            "attention.value_length_mla": config["v_head_dim"],
        }
    if "mlp_layer_types" in config:
        found["leading_dense_block_count"] = config["mlp_layer_types"].count("dense")
    if family_of(config) == "gemma4":
        heads, full = config["num_key_value_heads"], _full_heads(config)
        slides = [x == "sliding_attention" for x in config["layer_types"]]
        ropes = config["rope_parameters"]
        found |= {
            "attention.head_count_kv": [
                heads if x else full["num_key_value_heads"] for x in slides
            ],
            "attention.sliding_window_pattern": slides,
            "attention.key_length": full["head_dim"],
            "attention.value_length": full["head_dim"],
            "attention.key_length_swa": config["head_dim"],
            "attention.value_length_swa": config["head_dim"],
            "attention.shared_kv_layers": 0,
            "embedding_length_per_layer_input": 0,
            "expert_used_count": config["top_k_experts"],
            "final_logit_softcapping": config["final_logit_softcapping"],
            "rope.freq_base_swa": float(ropes["sliding_attention"]["rope_theta"]),
            "rope.dimension_count": full["head_dim"],
            "rope.dimension_count_swa": config["head_dim"],
        }
    if config["model_type"] == "lfm2_moe":
        heads = config["num_key_value_heads"]
        types = config["layer_types"]
        found["attention.head_count_kv"] = [heads * (x == "full_attention") for x in types]
        found["attention.layer_norm_rms_epsilon"] = config["norm_eps"]
        found["expert_weights_scale"] = None  # the converter drops it
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
