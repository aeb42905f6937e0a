"""Quality beside size: what rounding does to the demo model, in mixchat's forms and in others'.

    python tests/benchmarks/quality.py WORK [TEXT ...] [--windows 8] [--llama GGML] [--ik GGML]

Prints a table with all figures, then those that .github/quality.md and `mixchat plan` (`DEMO_LOSS`)
have, in their form, and writes WORK/frontier.json and WORK/frontier-*.svg.
WORK is a directory of models and results, 6 GB: the same command continues there. --forms takes
some of mixchat's forms. --llama and --ik name libggml of llama.cpp (libggml-base.so in
llama-cpp-python's folder lib) and of ik_llama.cpp, whose functions round weights (`peer_types.py`).
Without a TEXT the five of `quality_texts.py` are read. --checkpoint takes another Mixtral of one
file than the demo, such as the one of `part_experts.py`. Each needs another WORK. --dense prints
another table: attention and head in 16, 8, 6 and 4 bits, with experts in 4 bits, and in 16 bits.

The model is the demo's dense one as a mixture of one expert, padded and rescaled
(`padded_model.py`), so that all forms fit its shape and none meets the levels of its file. All
round the same matrices and are computed by mixchat, the others' as if they were unquantized.
"experts": the experts alone are rounded, all other matrices have 16 bits. "all": attention and head
too, by mixchat to 8 bits, by the others as llama-quantize does. The embedding stays as it is. The
bits of a weight are counted over the matrices that are rounded, with their scales. Each form is
compared with the unquantized model: how much higher perplexity is, and the KL divergence, in nats
for each token. "calibrated" is what `mixchat calibrate` makes, with a text that the model writes
itself. The others get an importance matrix of the same text.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from frontier import Point, draw
from quality_forms import (
    CALIBRATED,
    EXPERT_BITS,
    PARTS,
    QUANT_TYPES,
    WINDOW,
    Form,
    Workshop,
    write_model,
)
from quality_texts import write_texts
from torch.nn import functional
from transformers import AutoTokenizer

from mixchat.base.options import LoadOptions
from mixchat.loading.loader import load_engine

README_HEAD = """\
| form                | bits | experts alone | calibrated    | bits | all           | calibrated    |
| ------------------- | ---- | ------------- | ------------- | ---- | ------------- | ------------- |"""  # noqa: E501
FORMS = (*QUANT_TYPES, *EXPERT_BITS)
Texts = Mapping[str, Sequence[torch.Tensor]]  # by their names, in windows


@dataclass
class Variant:
    """A form of the model, and what was measured of it: by text, then "loss" or "kl" by window."""

    name: str
    rounded: str  # "experts", "all" or "dense"
    bits: float
    program: str = "mixchat"
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return the name, with the program's if it is another."""
        return self.name if self.program == "mixchat" else f"{self.program} {self.name}"

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


def log_probabilities(directory: Path, windows: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the log probabilities of the tokens that follow one in a window, [N, V]."""
    with closing(load_engine(directory, LoadOptions(device="cpu"))) as engine:
        for window in windows:
            cache = engine.held()[1]
            cache.cut(0)
            logits = engine.passes.model.forward(window, cache, logits_of=slice(None))
            yield logits[:-1].float().log_softmax(-1)


class Meter:
    """Measures forms on texts. The first one that it gets is what the others are compared with."""

    def __init__(self, work: Path, texts: Texts) -> None:
        self._work, self._texts, self._results = work, texts, work / "results.json"
        known = json.loads(self._results.read_bytes()) if self._results.exists() else {}
        self._known: dict[str, dict[str, object]] = known

    def measure(self, form: Form) -> Variant:
        """Return what a form gives, which is made and read if that was not done before."""
        key = f"{form.program} {form.name}, {form.rounded}"
        if key not in self._known:
            place, bits = form.make()
            self._known[key] = {"bits": bits, "figures": self._read(place)}
            self._results.write_text(json.dumps(self._known))
            print(f"measured: {key}", file=sys.stderr)
        return Variant(form.name, form.rounded, program=form.program, **self._known[key])

    def _read(self, place: Path) -> dict[str, dict[str, list[float]]]:
        every = [(name, n) for name, windows in self._texts.items() for n in range(len(windows))]
        found: dict[str, dict[str, list[float]]] = {}
        scores = log_probabilities(place, (self._texts[name][n] for name, n in every))
        for (name, number), mine in zip(every, scores, strict=True):
            path = self._work / f"expected-{name}-{number}.pt"
            if not path.exists():
                unfinished = path.with_suffix(".part")  # a kill left a file that cannot be read
                torch.save(mine, unfinished)
                unfinished.rename(path)
            loss = functional.nll_loss(mine, self._texts[name][number][1:]).item()
            figures = found.setdefault(name, {"loss": [], "kl": []})
            figures["loss"].append(loss)
            figures["kl"].append(divergence(mine, torch.load(path, mmap=True)))
        return found


def divergence(scores: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the KL divergence of log probabilities [N, V] to the expected ones, mean over N."""
    return functional.kl_div(scores, expected, reduction="batchmean", log_target=True).item()


def windows_of(checkpoint: Path, text: Path, count: int) -> tuple[torch.Tensor, ...]:
    """Return the first windows of the text, in which control tokens count as such."""
    whole, tokens = text.read_text(encoding="utf-8"), count * WINDOW
    ids = AutoTokenizer.from_pretrained(checkpoint)(whole[: 16 * tokens], verbose=False).input_ids
    if len(ids) < tokens:
        raise SystemExit(f"{text} has only {len(ids)} tokens")
    return torch.tensor(ids[:tokens]).split(WINDOW)


def show(variants: Sequence[Variant], names: Sequence[str]) -> None:
    """Print all figures. The first variant is what the others are compared with."""
    print("| form | rounded | bits |", *(f"{name} | KL |" for name in names))
    print("| --- | --- | ---: |", *("---: | ---: |" for _ in names))
    base = variants[0]
    for one in variants:
        print(f"| {one.label} | {one.rounded} | {one.bits:.2f} |", end="")
        for text in names:
            shown = f"{math.exp(statistics.mean(one.figures[text]['loss'])):.2f}"
            if one is not base:
                shown = f"{one.rise(base, text):+.1%}"
            print(f" {shown} | {one.kl(text):.3f} |", end="")
        print()


def readme_rows(variants: Sequence[Variant]) -> list[str]:
    """Return the rows of the page on quality: each form, the experts rounded alone, and all."""
    rows: dict[str, dict[str, str]] = {}
    base, *others = variants
    for one in others:
        form, calibrated, _ = one.label.partition(CALIBRATED)
        calibrated = calibrated or ("" if one.program == "mixchat" else CALIBRATED)
        cells = rows.setdefault(form, {})
        cells[f"{one.rounded} bits"] = f"{one.bits:.2f}"
        cells[one.rounded + calibrated] = f"{one.mean_rise(base):.1%}, {one.mean_kl():.3f}"
    columns = {"experts bits": 4, "experts": 13, f"experts{CALIBRATED}": 13}
    columns |= {"all bits": 4, "all": 13, f"all{CALIBRATED}": 13}
    return [
        f"| {form:19} | "
        + " | ".join(f"{cells.get(column, ''):{width}}" for column, width in columns.items())
        + " |"
        for form, cells in rows.items()
    ]


def demo_loss(variants: Sequence[Variant]) -> dict[str, tuple[float | None, float]]:
    """Return `DEMO_LOSS`: by `--expert-bits`, how much perplexity rises, plain and calibrated.

    Forms that a download calibrates have no plain figure.
    """
    rises = {
        one.name: round(one.mean_rise(variants[0]), 3) for one in variants if one.rounded == "all"
    }
    bits = {name: name.removesuffix(" bits") for name in QUANT_TYPES} | EXPERT_BITS
    return {
        bits[name]: (rises[name] if name in QUANT_TYPES else None, rises[name + CALIBRATED])
        for name in bits
        if name + CALIBRATED in rises
    }


def own_forms(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the names of mixchat's forms with "" or `CALIBRATED`. Some are always calibrated."""
    yield from ((name, "") for name in names if name in QUANT_TYPES)
    yield from ((name, CALIBRATED) for name in names)


def points(variants: Sequence[Variant]) -> list[Point]:
    """Return the frontier: of each form, its bits and what it loses."""
    return [
        Point(
            one.program,
            one.name,
            one.rounded,
            one.bits,
            one.mean_kl(),
            one.mean_rise(variants[0]),
            {text: (one.kl(text), one.rise(variants[0], text)) for text in one.figures},
        )
        for one in variants[1:]
    ]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("texts", type=Path, nargs="*", metavar="TEXT")
    parser.add_argument("--windows", type=int, default=8, help="of each text")
    parser.add_argument("--checkpoint", type=Path, metavar="DIRECTORY")
    parser.add_argument("--llama", type=Path, metavar="GGML")
    parser.add_argument("--ik", type=Path, metavar="GGML")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="of mixchat")
    parser.add_argument("--dense", action="store_true")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(exist_ok=True)
    checkpoint = given.checkpoint or write_model(work)
    paths = given.texts or write_texts(work / "texts", checkpoint)
    texts = {path.stem: windows_of(checkpoint, path, given.windows) for path in paths}
    libraries = {"llama.cpp": given.llama, "ik_llama.cpp": given.ik}
    workshop = Workshop(work, checkpoint, {name: path for name, path in libraries.items() if path})
    meter = Meter(work, texts)
    variants = [meter.measure(workshop.unquantized())]
    if given.dense:
        variants += map(meter.measure, workshop.dense())
    else:
        for name, calibrated in own_forms(given.forms):
            own = (workshop.own(name, calibrated, rounded) for rounded in given.parts)
            variants += map(meter.measure, own)
        for forms in zip(*map(workshop.peers, given.parts), strict=True):
            variants += map(meter.measure, forms)
            for form in forms:
                workshop.forget(form)
    print(f"{given.windows * WINDOW} tokens of each text, in windows of {WINDOW}\n")
    show(variants, list(texts))
    if not given.dense:
        draw(points(variants), work)
        print("", README_HEAD, *readme_rows(variants), sep="\n")
        if set(given.parts) == set(PARTS) and set(FORMS) == set(given.forms):
            print(f"\nDEMO_LOSS = {demo_loss(variants)}")


if __name__ == "__main__":
    main()
