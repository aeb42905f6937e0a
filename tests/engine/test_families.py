"""Models of every family against transformers: logits, chunks of prompts, and greedy texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import answer, logits

from mixchat.base.options import LoadOptions
from mixchat.engine.generate import Engine
from mixchat.loading.loader import load_engine

TOKENS = 40
TEXT = 24
SPARSE = {"num_local_experts": 17, "num_experts_per_tok": 10}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "mixtral, wide heads": ("mixtral", {"head_dim": 32}),
    "mixtral, narrow heads": (
        "mixtral",
        {"head_dim": 4, "num_attention_heads": 8, "num_key_value_heads": 8},
    ),
    "mixtral, one kv head": (
        "mixtral",
        {"num_key_value_heads": 1, "num_attention_heads": 6, "head_dim": 10},
    ),
    "mixtral, odd vocabulary": ("mixtral", {"vocab_size": 131}),
    "mixtral, 16 experts, top 3": (
        "mixtral",
        {"num_local_experts": 16, "num_experts_per_tok": 3},
    ),
    "mixtral, 5 experts, top 1": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 1}),
    "mixtral, window": ("mixtral", {"sliding_window": 7}),
    "mixtral, odd sizes": (
        "mixtral",
        {"hidden_size": 30, "intermediate_size": 17, "num_hidden_layers": 3},
    ),
    "mixtral, large eps, yarn": (
        "mixtral",
        {
            "rms_norm_eps": 1e-2,
            "num_hidden_layers": 1,
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "mscale": 0.7,
                "mscale_all_dim": 1.4,
            },
        },
    ),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, weights not normalized": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_moe, window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 7}),
    "qwen3_moe, biases": ("qwen3_moe", {"attention_bias": True}),
    "qwen3_moe, wide heads": ("qwen3_moe", {"head_dim": 48, "num_key_value_heads": 1, **SPARSE}),
    "qwen3_moe, 128 experts": (
        "qwen3_moe",
        {"num_local_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 24},
    ),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, weights normalized": ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False}),
    "qwen2_moe, windows": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, **SPARSE},
    ),
    "ernie4_5_moe": ("ernie4_5_moe", {}),
    "ernie4_5_moe, no shared experts": (
        "ernie4_5_moe",
        {"moe_num_shared_experts": 0, "tie_word_embeddings": False, **SPARSE},
    ),
    "ernie4_5_moe, all layers with experts": ("ernie4_5_moe", {"moe_layer_start_index": 0}),
    "dots1": ("dots1", {}),
    "dots1, weights not normalized": ("dots1", {"norm_topk_prob": False, **SPARSE}),
    "dots1, windows": (
        "dots1",
        {"first_k_dense_replace": 0, "sliding_window": 7, "max_window_layers": 1},
    ),
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe, two dense layers": ("glm4_moe", {"first_k_dense_replace": 2, **SPARSE}),
    "glm4_moe, no norms": (
        "glm4_moe",
        {"use_qk_norm": False, "attention_bias": False, "head_dim": 16},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {"num_key_value_heads": 4}),
    "glm4_moe_lite, odd heads": (
        "glm4_moe_lite",
        {
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "kv_lora_rank": 40,
            "qk_nope_head_dim": 11,
            "head_dim": 6,
            "v_head_dim": 9,
            "attention_bias": True,
            "mlp_layer_types": ["sparse"] * 3,
            **SPARSE,
        },
    ),
    "deepseek_v2": ("deepseek_v2", {"num_key_value_heads": 4}),
    "deepseek_v2, queries without a latent": (
        "deepseek_v2",
        {"num_key_value_heads": 4, "q_lora_rank": None},
    ),
    "deepseek_v2, groups": (
        "deepseek_v2",
        {
            "num_key_value_heads": 4,
            "topk_method": "group_limited_greedy",
            "num_local_experts": 24,
            "num_experts_per_tok": 6,
            "n_group": 6,
            "topk_group": 3,
            "routed_scaling_factor": 4.0,
        },
    ),
    "deepseek_v3": ("deepseek_v3", {"num_key_value_heads": 4}),
    "deepseek_v3, groups": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "num_local_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
        },
    ),
    "mistral4": ("mistral4", {"num_key_value_heads": 4}),
    "laguna": ("laguna", {}),
    "laguna, odd heads, capped logits": (
        "laguna",
        {
            "num_attention_heads_per_layer": [2, 10, 4, 6],
            "head_dim": 20,
            "moe_router_logit_softcapping": 0.1,
            "mlp_layer_types": ["sparse"] * 4,
            **SPARSE,
        },
    ),
    "minimax_m2": ("minimax_m2", {}),
    "minimax_m2, whole heads rotated": (
        "minimax_m2",
        {"rotary_dim": None, "num_key_value_heads": 1, "head_dim": 32, **SPARSE},
    ),
    "qwen3_next": ("qwen3_next", {}),
    "qwen3_next, weights not normalized": (
        "qwen3_next",
        {"norm_topk_prob": False, "linear_num_value_heads": 3, "linear_conv_kernel_dim": 3},
    ),
    "qwen3_5_moe": ("qwen3_5_moe", {}),
    "qwen3_5_moe, other heads": (
        "qwen3_5_moe",
        {"linear_num_key_heads": 5, "linear_num_value_heads": 10, "num_key_value_heads": 1},
    ),
    "lfm2_moe": ("lfm2_moe", {}),
    "lfm2_moe, no bias": (
        "lfm2_moe",
        {"use_expert_bias": False, "norm_topk_prob": False, "conv_L_cache": 4, **SPARSE},
    ),
    "mellum": ("mellum", {}),
    "mellum, full attention": ("mellum", {"layer_types": ["full_attention"] * 2, **SPARSE}),
    "mellum, another rope": (
        "mellum",
        {
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "original_max_position_embeddings": 16,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            }
        },
    ),
    "olmoe": ("olmoe", {}),
    "olmoe, no clipping": ("olmoe", {"clip_qkv": None, "num_key_value_heads": 4, **SPARSE}),
    "olmoe, weights normalized": ("olmoe", {"norm_topk_prob": True, "tie_word_embeddings": True}),
    "granitemoe": ("granitemoe", {}),
    "granitemoe, tied": ("granitemoe", {"tie_word_embeddings": True, **SPARSE}),
    "gemma4": ("gemma4", {}),
    "gemma4, sparse": (
        "gemma4",
        {"num_experts": 17, "top_k_experts": 10, "head_dim": 10, "global_head_dim": 16},
    ),
    "gemma4, values of their own": (
        "gemma4",
        {"attention_k_eq_v": False, "global_head_dim": 16, "final_logit_softcapping": None},
    ),
    "granitemoe, biases": ("granitemoe", {"attention_bias": True, "num_key_value_heads": 1}),
    "granitemoehybrid": ("granitemoehybrid", {}),
    "granitemoehybrid, odd heads": (
        "granitemoehybrid",
        {
            "mamba_n_heads": 3,
            "mamba_n_groups": 1,
            "mamba_d_state": 10,
            "mamba_d_conv": 3,
            "mamba_conv_bias": False,
            "position_embedding_type": "rope",
            **SPARSE,
        },
    ),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss, many experts": ("gpt_oss", {"num_key_value_heads": 1, "head_dim": 32, **SPARSE}),
    "gpt_oss, tight limit": ("gpt_oss", {"swiglu_limit": 0.5, "swiglu_alpha": 1.1}),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    model_type, changes = request.param
    return make_checkpoint(**{"model_type": model_type, "num_key_value_heads": 2} | changes)


@pytest.fixture(scope="module")
def engine(checkpoint: Path, install: Callable[..., Path]) -> Engine:
    return load_engine(install(checkpoint, quant_type="none"), LoadOptions(device="cpu"))


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return model.eval()


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return torch.randint(0, 97, (TOKENS,), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def test_logits_and_greedy_text_equal_transformers_in_fp32(engine, oracle, prompt):
    expected = oracle(prompt[None]).logits[0]
    for chunk in (TOKENS, 16, 1):  # a prompt in one piece, in chunks, and token by token
        difference = (logits(engine, prompt, chunk) - expected).abs().max()
        assert difference < 1e-4 * expected.abs().max(), f"{chunk} at a time"
    ids = prompt[None, :11]
    text = oracle.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=TEXT,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert answer(engine, prompt[:11].tolist(), max_tokens=TEXT) == text[0, 11:].tolist()
