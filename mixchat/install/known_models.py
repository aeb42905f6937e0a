"""The models with a short name. Their config.json is in known/, so the hub need not be asked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

from mixchat.weights.families.read_config import read_config, slices


@dataclass(frozen=True)
class GPQAScore:
    """A model's result in GPQA, hard questions about science, as its maker published it.

    percent: of right answers. Guessing gives 25. Makers measure in their own ways, some only with
    the harder questions of GPQA Diamond, so a few points say nothing. A model has no score if none
    was found that its maker published. The scores of gpt-oss, qwen3.6 and lfm2 were read in texts
    that cite the source, and not at the source.
    """

    percent: float
    source: str
    date: str  # year and month


@dataclass(frozen=True)
class KnownModel:
    """A repository on the hub, the name of its config.json in known/, and the model's quality."""

    repo: str
    file: str
    score: GPQAScore | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        path = Path(__file__).parent / "known" / f"{self.file}.json"
        config: dict[str, Any] = json.loads(path.read_bytes())
        return config

    @property
    def experts_quant_type(self) -> Literal["mxfp4"] | None:
        """Return the type of the experts' matrices in the checkpoint, None for bf16."""
        return "mxfp4" if "quantization_config" in self.config else None

    @property
    def layers(self) -> int:
        return read_config(self.config).num_hidden_layers

    def with_layers(self, layers: int) -> dict[str, Any]:
        """Return the config.json of the first layers alone."""
        text = {**self.config.get("text_config", self.config), "num_hidden_layers": layers}
        for name in ("layer_types", "num_attention_heads_per_layer"):
            if name in text:
                text[name] = text[name][:layers]
        return {**self.config, "text_config": text} if "text_config" in self.config else text

    @cached_property
    def fetched_bytes(self) -> int:
        """Return the bytes that a download fetches."""
        # This imports torch, for which completion in a shell cannot wait.
        from mixchat.base.safetensors import split_part

        sizes: dict[str, float] = {}
        for name, sources in slices(read_config(self.config)).items():
            in_4_bits = self.experts_quant_type and ".experts." in name and name.endswith(".weight")
            sizes |= {
                split_part(source.name)[0]: prod(source.shape) * (4.25 / 8 if in_4_bits else 2)
                for source in sources
            }
        return round(sum(sizes.values()))

    @property
    def fetched_gb(self) -> int:
        return round(self.fetched_bytes / 1e9)


# The values in known/ are the defaults of transformers' config classes, except for those that are
# named here. The ids of tokens come from the repositories. The models stand by size, with the
# oldest ones last.
KNOWN: dict[str, KnownModel] = {
    # All values come from the repository, by other programs. The multipliers are also those of 1B.
    "granite": KnownModel("ibm-granite/granite-3.1-3b-a800m-instruct", "granite"),
    # The experts are half as wide as by default.
    "olmoe": KnownModel("allenai/OLMoE-1B-7B-0125-Instruct", "olmoe"),
    # All values come from the repositories, by other programs.
    "lfm2": KnownModel("LiquidAI/LFM2-8B-A1B", "lfm2", GPQAScore(29.3, "its card", "2025-10")),
    # The ropes and the layers with a window come from the repository, by other programs.
    "mellum2": KnownModel("JetBrains/Mellum2-12B-A2.5B-Instruct", "mellum2"),
    # The class describes 120b. 20b has fewer layers and experts. The score is of high effort.
    "gpt-oss": KnownModel(
        "openai/gpt-oss-20b", "gpt-oss", GPQAScore(71.5, "arXiv 2508.10925", "2025-08")
    ),
    # All values of the next three come from the repositories, by other programs.
    "lfm2-24b": KnownModel("LiquidAI/LFM2-24B-A2B", "lfm2-24b"),
    "gemma4": KnownModel(
        "google/gemma-4-26B-A4B-it", "gemma4", GPQAScore(82.3, "its card", "2026-04")
    ),
    "glm-4.7-flash": KnownModel(
        "zai-org/GLM-4.7-Flash", "glm-4.7-flash", GPQAScore(75.2, "its card", "2026-01")
    ),
    # The layers, head_dim, the context, rope_theta and norm_topk_prob come from the repositories.
    "qwen3": KnownModel(
        "Qwen/Qwen3-30B-A3B-Instruct-2507", "qwen3", GPQAScore(70.4, "its card", "2025-07")
    ),
    "qwen3-coder": KnownModel("Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen3"),
    # All values of the next three come from the repositories, by other programs.
    "laguna": KnownModel("poolside/Laguna-XS-2.1", "laguna"),
    "qwen3.6": KnownModel(
        "Qwen/Qwen3.6-35B-A3B", "qwen3.6", GPQAScore(86.0, "its card", "2026-04")
    ),
    "qwen3-coder-next": KnownModel("Qwen/Qwen3-Coder-Next", "qwen3-coder-next"),
    "8x22b": KnownModel("mistralai/Mixtral-8x22B-Instruct-v0.1", "mixtral-8x22b"),
    "instruct": KnownModel("mistralai/Mixtral-8x7B-Instruct-v0.1", "mixtral-8x7b"),
    "base": KnownModel("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b"),
}
"""By the name that commands take."""

ALIASES = {name: model.repo for name, model in KNOWN.items()}


def known_model(repo: str) -> KnownModel | None:
    """Return the known model of a repository."""
    return next((model for model in KNOWN.values() if model.repo == repo), None)
