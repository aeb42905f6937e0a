"""Reads the config.json of any family, and finds the tensors that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_json_object
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from mixchat.weights.families.dots1 import DOTS1
from mixchat.weights.families.ernie4_5_moe import ERNIE4_5_MOE
from mixchat.weights.families.family import Family, Slice, decoder_tensors
from mixchat.weights.families.gemma4 import GEMMA4
from mixchat.weights.families.glm import GLM4_MOE, GLM4_MOE_LITE
from mixchat.weights.families.gpt_oss import GPT_OSS
from mixchat.weights.families.granite import GRANITEMOE, GRANITEMOEHYBRID
from mixchat.weights.families.laguna import LAGUNA
from mixchat.weights.families.lfm2_moe import LFM2_MOE
from mixchat.weights.families.mellum import MELLUM
from mixchat.weights.families.minimax_m2 import MINIMAX_M2
from mixchat.weights.families.mistral import MISTRAL4, MIXTRAL
from mixchat.weights.families.olmoe import OLMOE
from mixchat.weights.families.qwen import QWEN2_MOE, QWEN3_5_MOE, QWEN3_MOE, QWEN3_NEXT

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(MIXTRAL, QWEN3_MOE, MELLUM, OLMOE, GRANITEMOE, GPT_OSS),
        *(QWEN2_MOE, ERNIE4_5_MOE, DOTS1, GLM4_MOE, MINIMAX_M2),
        *(LFM2_MOE, QWEN3_NEXT, QWEN3_5_MOE, GLM4_MOE_LITE, DEEPSEEK_V2, DEEPSEEK_V3),
        *(GEMMA4, MISTRAL4, GRANITEMOEHYBRID, LAGUNA),
    )
}

# Features of well-known models that no family here has.
_MISSING = {
    "jamba": "Mamba layers of version 1",
    "kimi_k2": "a tokenizer that is Python code",
    "kimi_linear": "Kimi delta attention",
    "nemotron_h": "layers of a mixer or experts alone",
    "llama4": "attention in chunks",
    "minimax": "lightning attention",
    "phimoe": "SparseMixer routing",
}
# The uses of parts that are not of the language model, and the keys of config.json that show them.
_OTHER_PARTS = {
    "images": ("vision_config",),
    "sound": ("audio_config",),
    "predicting further tokens": ("mtp_num_hidden_layers", "num_nextn_predict_layers"),
}


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """Read the keys of a config.json. Raises `CheckpointError` if no family here has them.

    Of a model for text and images, the language model is read.
    """
    raw = _of_language_model(raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        missing = _MISSING.get(str(model_type))
        needs = f" needs {missing}, which" if missing else ", which"
        raise CheckpointError(
            f"config.json says model_type {model_type!r:.80}{needs} mixchat does not run",
            hint=f"It runs {', '.join(FAMILIES)}.",
        )
    # It is checked here, because config.json comes before many gigabytes of weights.
    value = raw.get("quantization_config")
    quantization = value if isinstance(value, dict) else {}
    method = quantization.get("quant_method")
    in_blocks = method == "fp8" and quantization.get("weight_block_size") == [128, 128]
    if method not in (None, "bitsandbytes", "mxfp4") and not in_blocks:
        raise CheckpointError(
            f"config.json says that the weights are quantized with {method!r:.80}, which mixchat "
            "does not read",
            hint="Download the checkpoint that it was made of, one in GGUF (ORG/NAME:Q4_K_M), or "
            "one that bitsandbytes has quantized.",
        )
    config = FAMILIES[model_type].read_config(raw)
    config.check()
    keys = {**raw, "num_nextn_predict_layers": config.num_nextn_predict_layers}
    parts = [part for part, names in _OTHER_PARTS.items() if any(keys.get(key) for key in names)]
    return replace(config, left_out=tuple(parts))


def _of_language_model(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a language model, which are in `text_config` if there is more than text.

    Alone it may be saved under the same model_type with "_text".
    """
    text = raw.get("text_config")
    model_type = raw.get("model_type")
    whole = raw
    if isinstance(text, dict):
        # Mistral names the whole model by its image part.
        is_known = isinstance(model_type, str) and model_type in FAMILIES
        model_type = model_type if is_known else text.get("model_type", model_type)
        raw = {**raw, **{key: value for key, value in text.items() if value is not None}}
        # As in transformers, the whole model decides whether the head is the embedding, and which
        # tokens end an answer.
        for key in ("tie_word_embeddings", "eos_token_id"):
            if whole.get(key) is not None:
                raw[key] = whole[key]
    if isinstance(model_type, str) and (family := model_type.removesuffix("_text")) in FAMILIES:
        return {**raw, "model_type": family}
    return {**raw, "model_type": model_type}


def read_config_file(path: Path) -> ModelConfig:
    """Read a config.json. Raises `CheckpointError`."""
    return read_config(read_json_object(path))


@lru_cache(maxsize=4)  # a large model has 20,000
def slices(config: ModelConfig) -> Mapping[str, tuple[Slice, ...]]:
    """Return the slices of a plain checkpoint that make each tensor of the installed model.

    The result has the size that the config asks for, so no unchecked config may come here.
    """
    return dict(decoder_tensors(config, FAMILIES[config.model_type]))
