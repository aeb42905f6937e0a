"""Perplexity of the demo model: in mixchat, in transformers with the same 4 bits, and in bf16.

    python tests/benchmarks/perplexity.py TEXT [TOKENS]          (the first 4,096 tokens)

Three figures over the same windows of 512 tokens:

- mixchat: the kept model, as `mixchat run -m demo` uses it;
- reference: transformers, in bf16, on the same checkpoint with each expert taken to NF4 and back by
  bitsandbytes (the two must agree within 0.5%);
- unquantized: transformers, in bf16, on the checkpoint as it is.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file

from mixchat.engine.loader import LoadOptions, load_engine
from mixchat.progress import NoProgress
from mixchat.text.tokenizer import load_tokenizer
from mixchat.weights.build import build
from mixchat.weights.demo import build_checkpoint
from mixchat.weights.manifest import Source
from mixchat.weights.origin import LocalOrigin
from mixchat.weights.quantize import QuantizeOptions, blueprint_of

WINDOW = 512
Logits = Callable[[torch.Tensor], torch.Tensor]


def perplexity(logits: Logits, ids: torch.Tensor) -> float:
    """exp of the mean loss over all tokens but the first of each window."""
    loss, count = 0.0, 0
    for window in ids.split(WINDOW):
        scores = logits(window)[:-1].float()
        loss += torch.nn.functional.cross_entropy(scores, window[1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(loss / count)


def mixchat_logits(directory: Path) -> Logits:
    engine = load_engine(directory, LoadOptions(device="cpu"))

    @torch.inference_mode()
    def logits(ids: torch.Tensor) -> torch.Tensor:
        engine._cache.length = 0
        return engine._model.forward(ids, engine._cache, all_logits=True)

    return logits


def transformers_logits(checkpoint: Path) -> Logits:
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()

    @torch.inference_mode()
    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(ids[None]).logits[0]

    return logits


def dequantize_experts(checkpoint: Path) -> None:
    """Take each expert matrix to NF4 and back, in place, by bitsandbytes itself."""
    for path in checkpoint.glob("*.safetensors"):
        tensors = load_file(path)
        for name, weight in tensors.items():
            if ".experts." in name:
                codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
                tensors[name] = bnb.dequantize_4bit(codes, state).to(weight.dtype)
        save_file(tensors, path, metadata={"format": "pt"})


def main(text: Path, tokens: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, kept = Path(temporary) / "checkpoint", Path(temporary) / "kept"
        build_checkpoint(checkpoint, NoProgress())
        origin = LocalOrigin(checkpoint, Source("demo"))
        build(origin, kept, blueprint_of(origin.index, QuantizeOptions()))
        ids = load_tokenizer(kept).encode(text.read_text(encoding="utf-8"))[:tokens]
        if len(ids) < tokens:
            raise SystemExit(f"the text has only {len(ids)} tokens")
        window = torch.tensor(ids)
        figures = {
            "mixchat": perplexity(mixchat_logits(kept), window),
            "unquantized": perplexity(transformers_logits(checkpoint), window),
        }
        dequantize_experts(checkpoint)
        figures["reference"] = perplexity(transformers_logits(checkpoint), window)
    print(f"{tokens} tokens in windows of {WINDOW}")
    for name, value in figures.items():
        print(f"{name:12} {value:7.3f}   mixchat against it {figures['mixchat'] / value - 1:+.2%}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int((sys.argv[2:] or ["4096"])[0]))
