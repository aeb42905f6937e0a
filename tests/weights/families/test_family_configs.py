"""The config.json of each family, with the values of a published model, against transformers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextScaledWordEmbedding

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.install.known_models import KNOWN
from mixchat.weights.families.read_config import FAMILIES, read_config

SHARED = {"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False}
ALTERNATING = ["sliding_attention", "full_attention"]


def _known(name: str, *without: str) -> dict[str, Any]:
    """Return the config.json of a known model, as if it were in 16 bits, without some keys."""
    other = ("model_type", "quantization_config", *without)
    config = {**SHARED, **KNOWN[name].config}
    return {key: value for key, value in config.items() if key not in other}


def _usual(model_type: str, **changes: Any) -> dict[str, Any]:
    """Return a published config.json, which differs so from the defaults of transformers' class.

    It has the older keys, which that class turns into others.
    """
    newer = ("model_type", "layer_types", "rope_parameters", "num_mtp_layers", "head_dim")
    config = AutoConfig.for_model(model_type).to_dict()
    return {**{key: config[key] for key in config if key not in newer}, **changes}


def _yarn(scale: float) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": scale,
        "mscale_all_dim": scale,
        "original_max_position_embeddings": 4096,
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **_known("qwen3-coder-next", "layer_types"),
        "full_attention_interval": 4,
        "intermediate_size": 5120,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "rope_scaling": None,
    },
    "lfm2_moe": {**_known("lfm2", "tie_word_embeddings"), "tie_embedding": True},
    "qwen3_moe": {
        **_known("qwen3"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_window_layers": 48,
        "use_sliding_window": False,
        "sliding_window": None,
        "rope_scaling": None,
    },
    "qwen2_moe": _usual(
        "qwen2_moe",
        max_position_embeddings=8192,
        max_window_layers=21,
        sliding_window=32768,
        rope_theta=1e6,
        eos_token_id=151643,
    ),
    "ernie4_5_moe": _usual("ernie4_5_moe", moe_layer_end_index=27, rope_theta=5e5),
    "dots1": _usual(
        "dots1",
        hidden_size=4096,
        n_routed_experts=128,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        max_position_embeddings=32768,
        sliding_window=None,
        rms_norm_eps=1e-5,
        rope_theta=1e7,
        eos_token_id=151649,
    ),
    "laguna": _usual(
        "laguna",
        head_dim=128,
        layer_types=["full_attention", *["sliding_attention"] * 3] * 10,
        num_attention_heads_per_layer=[48, 64, 64, 64] * 10,
        mlp_only_layers=[0],
        gating="per-head",
        max_position_embeddings=262144,
        moe_routed_scaling_factor=2.5,
        eos_token_id=[2, 24],
        rope_parameters={
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 5e5,
                "factor": 32.0,
                "original_max_position_embeddings": 8192,
                "beta_fast": 64.0,
                "beta_slow": 1.0,
                "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "glm4_moe": _usual(
        "glm4_moe",
        attention_bias=True,
        head_dim=128,
        num_nextn_predict_layers=1,
        partial_rotary_factor=0.5,
        rope_theta=1e6,
        eos_token_id=[151329, 151336, 151338],
    ),
    "glm4_moe_lite": _known("glm-4.7-flash", "first_k_dense_replace"),
    "deepseek_v2": _usual(
        "deepseek_v2",
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        q_lora_rank=None,
        max_position_embeddings=163840,
        rope_theta=10000,
        rope_scaling=_yarn(0.707),
        eos_token_id=100001,
    ),
    "deepseek_v3": _usual(
        "deepseek_v3",
        num_nextn_predict_layers=1,
        max_position_embeddings=163840,
        rope_theta=10000,
        rope_scaling=_yarn(1.0),
    ),
    "minimax_m2": _usual(
        "minimax_m2",
        head_dim=128,
        scoring_func="sigmoid",
        use_routing_bias=True,
        use_qk_norm=True,
        qk_norm_type="per_layer",
        rotary_dim=64,
        use_mtp=True,
        num_mtp_modules=3,
        rope_theta=5000000,
    ),
    "mellum": {**_known("mellum2"), "mlp_layer_types": ["sparse"] * 28, "eos_token_id": [1, 2]},
    "olmoe": {**_known("olmoe"), "rope_scaling": None},
    "granitemoe": {**_known("granite"), "rope_scaling": None},
    # H-Tiny, as other programs quote it.
    "granitemoehybrid": {
        **SHARED,
        "vocab_size": 100352,
        "hidden_size": 1536,
        "intermediate_size": 512,
        "shared_intermediate_size": 1024,
        "num_hidden_layers": 40,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "num_local_experts": 64,
        "num_experts_per_tok": 6,
        "mamba_d_conv": 4,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_expand": 2,
        "mamba_n_groups": 1,
        "mamba_n_heads": 48,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "layer_types": [
            "attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)
        ],
        "position_embedding_type": "nope",
        "max_position_embeddings": 131072,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 100257,
    },
    "gpt_oss": {**_known("gpt-oss"), "experts_per_token": 4, "initial_context_length": 4096},
}
SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
# Features of families, each with its value in the `ModelConfig` of a family without it.
OPTIONAL = {
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "clip_qkv": None,
    "swiglu_limit": None,
    "embedding_multiplier": 1.0,
    "attention_multiplier": None,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def read(model_type: str, **changes: Any) -> ModelConfig:
    return read_config({"model_type": model_type, **PUBLISHED[model_type], **changes})


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_a_published_config_is_read_as_transformers_reads_it(model_type):
    theirs = AutoConfig.for_model(model_type, **PUBLISHED[model_type])
    ours = read(model_type)
    for key in SAME:
        others = {"num_local_experts": "num_experts", "rms_norm_eps": "norm_eps"}
        name = key if hasattr(theirs, key) else others[key]
        assert getattr(ours, key) == getattr(theirs, name), key
    for key, default in OPTIONAL.items():
        usual = getattr(theirs, f"moe_{key}", default)
        assert getattr(ours, key) == getattr(theirs, key, usual), key
    bias = getattr(theirs, "attention_bias", getattr(theirs, "qkv_bias", False))
    assert (ours.attention_bias or ours.qkv_bias) == bias
    inner = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
    heads = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.intermediate_size, ours.head_dim) == (inner, heads)
    counts_dense = "moe_layer_start_index", "num_dense_layers", "first_k_dense_replace"
    first = next((getattr(theirs, key) for key in counts_dense if hasattr(theirs, key)), 0)
    first = first or getattr(theirs, "mlp_layer_types", []).count("dense")
    assert ours.first_k_dense_replace == first
    assert not first or ours.dense_intermediate_size == theirs.intermediate_size
    keys = "shared_expert_intermediate_size", "shared_intermediate_size"
    shared = next((getattr(theirs, key) for key in keys if hasattr(theirs, key)), None)
    counts = (getattr(theirs, f"{x}_shared_experts", 0) for x in ("n", "moe_num"))
    assert ours.shared_expert_intermediate_size == (shared or inner * max(counts))
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (tuple(eos) if isinstance(eos, list) else (eos,))
    types = getattr(theirs, "layer_types", None) or ["full_attention"] * ours.num_hidden_layers
    for layer, kind in enumerate(types):
        assert ours.window(layer) == (theirs.sliding_window if "sliding" in kind else None)
        rope = theirs.rope_parameters.get(kind, theirs.rope_parameters)
        own = ours.rope(layer)
        rope_type = rope["rope_type"]
        if getattr(theirs, "position_embedding_type", "rope") != "rope":
            rope_type = "nope"
        assert (own.rope_type, own.rope_theta) == (rope_type, rope["rope_theta"])
        assert own.partial_rotary_factor == rope.get("partial_rotary_factor", 1)


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_a_config_that_transformers_5_wrote_is_the_same(model_type):
    raw = AutoConfig.for_model(model_type, **PUBLISHED[model_type]).to_dict()
    assert read_config(raw) == read(model_type)


# Keys that the published files have, though transformers has defaults for them.
@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("qwen3_moe", ("decoder_sparse_step", "mlp_only_layers", "use_sliding_window")),
        ("qwen2_moe", ("shared_expert_intermediate_size", "decoder_sparse_step")),
        ("ernie4_5_moe", ("moe_num_experts", "moe_k", "moe_layer_start_index", "use_bias")),
        ("ernie4_5_moe", ("moe_layer_end_index", "moe_layer_interval", "tie_word_embeddings")),
        ("glm4_moe", ("n_routed_experts", "n_shared_experts", "partial_rotary_factor")),
        ("glm4_moe", ("first_k_dense_replace", "num_nextn_predict_layers", "use_qk_norm")),
        ("glm4_moe_lite", ("q_lora_rank", "kv_lora_rank", "v_head_dim", "routed_scaling_factor")),
        ("deepseek_v3", ("n_group", "topk_group", "q_lora_rank", "first_k_dense_replace")),
        ("minimax_m2", ("num_key_value_heads", "head_dim", "num_local_experts", "rope_theta")),
        ("mellum", ("sliding_window", "mlp_layer_types", "head_dim", "norm_topk_prob")),
        ("qwen3_next", ("num_experts", "num_key_value_heads", "head_dim", "norm_topk_prob")),
        ("qwen3_next", ("full_attention_interval", "partial_rotary_factor", "mlp_only_layers")),
        ("qwen3_next", ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim")),
        ("lfm2_moe", ("num_dense_layers", "use_expert_bias", "norm_eps", "conv_L_cache")),
        ("lfm2_moe", ("tie_embedding", "rope_theta", "num_experts", "conv_bias")),
        ("granitemoehybrid", ("shared_intermediate_size", "mamba_d_head", "mamba_expand")),
        ("granitemoehybrid", ("mamba_n_groups", "mamba_d_conv", "position_embedding_type")),
        ("granitemoehybrid", ("mamba_conv_bias", "mamba_proj_bias")),
        ("laguna", ("gating", "moe_router_logit_softcapping", "sliding_window", "head_dim")),
        ("laguna", ("num_experts", "num_key_value_heads", "shared_expert_intermediate_size")),
        ("olmoe", ("clip_qkv", "norm_topk_prob", "attention_bias")),
        ("gpt_oss", ("layer_types", "sliding_window", "swiglu_limit", "rope_scaling")),
    ],
)
def test_missing_keys_are_those_of_transformers(model_type, keys):
    raw = {"model_type": model_type, **PUBLISHED[model_type]}
    assert read_config({key: raw[key] for key in raw if key not in keys}) == read_config(raw)


def test_the_language_model_of_qwen3_5_is_read_alone_or_beside_vision():
    text = {**PUBLISHED["qwen3_next"], "vocab_size": 248320, "num_experts": 256}
    text |= {"num_hidden_layers": 40, "num_experts_per_tok": 8}
    rope = {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.25}
    rope |= {"mrope_interleaved": True, "mrope_section": [11, 11, 10]}
    text["rope_parameters"] = rope
    whole = AutoConfig.for_model("qwen3_5_moe", text_config=text).to_dict()
    alone = AutoConfig.for_model("qwen3_5_moe_text", **text).to_dict()
    ours = read_config(whole)
    assert replace(ours, left_out=()) == read_config(alone)
    assert read_config(alone) == read_config({"model_type": "qwen3_5_moe", "text_config": text})
    assert (ours.num_local_experts, ours.num_experts_per_tok, ours.norm_topk_prob) == (256, 8, True)
    assert ours.layer_types.count("full_attention") == 10
    assert ours.layer_type(39) == "full_attention"
    assert ours.rope(3).partial_rotary_factor == 0.25


GEMMA: dict[str, Any] = {
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "intermediate_size": 2112,
    "hidden_size": 2816,
    "hidden_size_per_layer_input": 0,
}


def test_layers_of_gemma_4_are_those_of_transformers():
    """Its newer configs have the heads of full layers in `per_layer_config`."""
    theirs = AutoConfig.for_model("gemma4_text", **GEMMA)
    ours = read_config(theirs.to_dict())
    assert [*map(ours.layer_type, range(30))] == theirs.layer_types
    for layer in range(30):
        own = theirs.per_layer_config[layer]
        shape = own.num_attention_heads, own.num_key_value_heads, own.head_dim
        assert ours.attention_shape(layer) == shape
    assert ours.embedding_multiplier == 2816**0.5
    published = {**GEMMA, "head_dim": 256, "global_head_dim": 512, "num_attention_heads": 8}
    published |= {"vocab_size": 262144, "num_hidden_layers": 30, "max_position_embeddings": 131072}
    assert read_config({"model_type": "gemma4_text", **published}) == ours
    nested = {"model_type": "gemma4", "text_config": published, "eos_token_id": [1, 106]}
    assert read_config(nested) == replace(ours, eos_token_ids=(1, 106))
    in_bf16 = read_config({**nested, "dtype": "bfloat16"})
    embedding = Gemma4TextScaledWordEmbedding(2, 2816, 0, embed_scale=2816**0.5).bfloat16()
    with torch.no_grad():
        embedding.weight.fill_(1)
    assert embedding(torch.tensor([1])).unique().item() == in_bf16.embedding_multiplier


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"enable_moe_block": False}, "dense models"),
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input is 256"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers is 4"),
        ({"use_bidirectional_attention": "all"}, "later tokens"),
        ({"hidden_activation": "silu"}, "hidden_activation"),
        ({"final_logit_softcapping": -1}, "final_logit_softcapping"),
        ({"per_layer_config": {"5": {"head_dim": 8}, "11": {"head_dim": 4}}}, "not of one shape"),
        ({"per_layer_config": [3]}, "per_layer_config"),
        ({"num_global_key_value_heads": 3}, "global"),
    ],
)
def test_models_of_gemma_4_that_do_not_run_are_refused(change, message):
    raw = AutoConfig.for_model("gemma4_text", **GEMMA).to_dict()
    if "num_global_key_value_heads" in change:
        del raw["per_layer_config"]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_config({**raw, **change})
    assert "\n" not in str(caught.value)


def test_mellum_without_types_of_layers_has_full_attention():
    config = read("mellum", layer_types=None)
    assert {config.window(layer) for layer in range(28)} == {None}


def test_a_window_of_qwen_is_that_of_all_layers_if_it_is_used():
    config = read("qwen3_moe", use_sliding_window=True, sliding_window=512, max_window_layers=4)
    assert {config.window(layer) for layer in range(48)} == {512}
    unused = read("qwen3_moe", use_sliding_window=False, sliding_window=512)
    assert {unused.window(layer) for layer in range(48)} == {None}


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2: models with dense"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]: models with dense"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ("ernie4_5_moe", {"moe_layer_interval": 2}, "moe_layer_interval is 2: dense layers after"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias is true"),
        ("dots1", {"n_group": 7}, "128 experts in 7 groups, of which 1 count"),
        ("dots1", {"n_group": 32}, "6 experts per token of only 4"),
        ("dots1", {"first_k_dense_replace": 62}, "none of 62 layers has experts"),
        ("dots1", {"max_window_layers": -1, "sliding_window": 5}, "max_window_layers is -1"),
        ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor of 1.5 cannot"),
        ("glm4_moe", {"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense"] * 23}, "mlp_layer_types"),
        ("glm4_moe_lite", {"rope_interleave": False}, "rope_interleave"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias needs a q_lora_rank"),
        ("deepseek_v2", {"kv_lora_rank": 0}, "kv_lora_rank"),
        ("laguna", {"gating": "per-element"}, "gating is 'per-element'"),
        ("laguna", {"attention_bias": True}, "attention_bias is not supported"),
        ("laguna", {"moe_apply_router_weight_on_input": True}, "router_weight_on_input"),
        ("laguna", {"num_attention_heads_per_layer": [48, 64]}, "num_attention_heads_per_layer"),
        ("laguna", {"num_attention_heads_per_layer": [48, 9] * 20}, "9 attention heads cannot"),
        ("laguna", {"num_attention_heads_per_layer": [48, 0] * 20}, "is 0, not a positive"),
        ("laguna", {"num_attention_heads_per_layer": [2**20] * 40}, "heads are more than any"),
        ("laguna", {"moe_router_logit_softcapping": -1}, "moe_router_logit_softcapping"),
        ("laguna", {"mlp_layer_types": ["sparse", "dense"] * 20}, "mlp_layer_types"),
        ("minimax_m2", {"rotary_dim": 256}, "partial_rotary_factor of 2 cannot"),
        ("minimax_m2", {"rotary_dim": "64"}, "rotary_dim is '64'"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob"),
        ("qwen3_moe", {"num_experts": None}, "num_local_experts is None"),
        ("qwen3_next", {"mlp_only_layers": [3]}, "models with dense layers do not run"),
        ("qwen3_next", {"linear_num_value_heads": 24}, "24 value heads cannot share 16 key heads"),
        ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval is 0"),
        ("lfm2_moe", {"conv_bias": True}, "conv_bias is not supported"),
        ("lfm2_moe", {"layer_types": ["conv"] * 3}, "3 layer_types for 24 layers"),
        ("lfm2_moe", {"conv_L_cache": 0}, "conv_L_cache is 0"),
        ("mellum", {"mlp_layer_types": ["dense"] + ["sparse"] * 27}, "mlp_layer_types"),
        ("granitemoehybrid", {"num_local_experts": 0}, "num_local_experts is 0"),
        ("granitemoehybrid", {"mamba_n_groups": 5}, "48 heads of Mamba2 cannot be 5 groups"),
        ("granitemoehybrid", {"mamba_d_state": 0}, "mamba_d_state is 0"),
        ("granitemoehybrid", {"mamba_proj_bias": True}, "mamba_proj_bias"),
        ("granitemoehybrid", {"time_step_limit": [0.1, 1]}, "time_step_limit"),
        ("granitemoehybrid", {"layer_types": [[]] * 40}, "layer_types"),
        ("granitemoehybrid", {"layer_types": "mamba"}, "layer_types"),
        ("mellum", {"mlp_layer_types": 3}, "mlp_layer_types"),
        ("mellum", {"layer_types": ALTERNATING}, "2 layer_types for 28"),
        ("mellum", {"layer_types": ["chunked_attention"] * 28}, "layer_types"),
        ("mellum", {"layer_types": [[]] * 28}, "layer_types"),
        ("mellum", {"layer_types": "full_attention"}, "layer_types"),
        ("olmoe", {"clip_qkv": -8}, "clip_qkv"),
        ("granitemoe", {"logits_scaling": 0}, "logits_scaling"),
        ("granitemoe", {"attention_multiplier": "1"}, "attention_multiplier"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit"),
        ("gpt_oss", {"num_hidden_layers": 2**30, "layer_types": None}, "1073741824 layers"),
        ("mellum", {"num_hidden_layers": 2**30, "layer_types": None}, "1073741824 layers"),
    ],
)
def test_what_does_not_run_is_refused_in_one_line(model_type, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read(model_type, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [
        ("jamba", "Mamba"),
        ("kimi_k2", "tokenizer"),
        ("llama4", "attention in chunks"),
    ],
)
def test_a_well_known_type_is_refused_by_what_it_needs(model_type, missing):
    with pytest.raises(CheckpointError, match=f"'{model_type}'.*{missing}.*does not") as caught:
        read_config({**PUBLISHED["qwen3_moe"], "model_type": model_type})
    assert "\n" not in str(caught.value)
    assert model_type not in FAMILIES


def test_every_other_type_of_transformers_is_refused_with_the_list_of_what_runs():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    others = {name for name in CONFIG_MAPPING_NAMES if name.removesuffix("_text") not in FAMILIES}
    assert len(others) > 300
    for other in others:
        with pytest.raises(CheckpointError, match=f"model_type '{other}'") as caught:
            read_config({**PUBLISHED["qwen3_moe"], "model_type": other})
        assert all(model_type in str(caught.value.hint) for model_type in FAMILIES)
