"""Models in GGUF: each kind of file, run by llama.cpp and installed by mixchat.

    python tests/benchmarks/gguf_kinds.py WORK --python PYTHON [--kinds Q8_0 ...] [--windows 2]

Prints a table: the KL divergence from the unquantized model in nats a token, and how much higher
perplexity is, means of the five texts of `quality_texts.py`. "llama.cpp" runs the file. "as read"
is mixchat with the same weights in 16 bits. It differs from "llama.cpp" by the arithmetic alone if
mixchat reads the file right. "installed" is what `mixchat download FILE` makes, 4 bits and
attention in 8, which rounds a second time. In F16 it is what 4 bits alone cost. Experts in MXFP4
are copied as they are.

"tokens": windows of the texts that llama.cpp and mixchat cut as the original tokenizer does.

The model is the one of `quality.py`, the demo's dense model as a mixture, here of two equal
experts. PYTHON has llama-cpp-python, whose `llama_model_quantize` makes the files. WORK gets 8 GB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from padded_model import two_experts
from quality import Texts, divergence, log_probabilities, windows_of
from quality_forms import install, write_demo, write_model
from quality_texts import write_texts
from torch.nn import functional

from mixchat.base.progress import NoProgress
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.source.open_checkpoint import open_checkpoint
from mixchat.text.choose import load_tokenizer
from mixchat.weights.format.manifest import Source

KINDS = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "MXFP4_MOE")
CHILD = Path(__file__).with_name("gguf_kinds_child.py")


def write_original(work: Path) -> Path:
    """Write the model of `write_model` to a GGUF file in fp32."""
    target = work / "original.gguf"
    if not target.exists():
        unfinished = work / "original.part"
        write_demo(work, unfinished, two_experts)
        unfinished.rename(target)
    return target


class Measurement:
    """Compares models with the unquantized one, of which it keeps the log probabilities."""

    def __init__(self, work: Path, texts: Texts) -> None:
        self._work, self._texts = work, texts
        self._windows = [window for windows in texts.values() for window in windows]
        self._expected: list[torch.Tensor] = []
        self._loss = 0.0

    def set_expected(self, scores: Iterator[torch.Tensor]) -> None:
        self._expected = [one.half() for one in scores]
        self._loss, _ = self._figures(iter(self._expected))

    def figures(self, scores: Iterator[torch.Tensor]) -> str:
        """Return the rise of perplexity and the KL divergence as a cell."""
        loss, kl = self._figures(scores)
        return f"{math.expm1(loss - self._loss):.1%}, {kl:.3f}"

    def _figures(self, scores: Iterator[torch.Tensor]) -> tuple[float, float]:
        losses, divergences = [], []
        for mine, expected, window in zip(scores, self._expected, self._windows, strict=True):
            losses.append(functional.nll_loss(mine.float(), window[1:]).item())
            divergences.append(divergence(mine.float(), expected.float()))
        return statistics.mean(losses), statistics.mean(divergences)

    def of_mixchat(self, place: Path) -> Iterator[torch.Tensor]:
        return log_probabilities(place, self._windows)

    def of_llama(self, python: str, file: Path) -> Iterator[torch.Tensor]:
        """Yield what llama.cpp computes, in a process with a window's logits at a time."""
        out = self._work / "logits.npy"
        ids = json.dumps([window.tolist() for window in self._windows])
        command = [python, str(CHILD), "logits", str(file), str(out)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(ids + "\n")
            child.stdin.flush()
            for _ in self._windows:
                if not child.stdout.readline():
                    raise SystemExit("llama.cpp failed")
                yield torch.from_numpy(np.load(out))[:-1].log_softmax(-1)
                child.stdin.write("\n")
                child.stdin.flush()


def equal_tokens(python: str, file: Path, place: Path, paths: Sequence[Path], texts: Texts) -> str:
    """Return how many windows both programs cut as the original tokenizer does."""
    size = sum(len(window) for window in next(iter(texts.values())))
    command = [python, str(CHILD), "tokens", str(file), str(16 * size), *map(str, paths)]
    theirs = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    tokenizer = load_tokenizer(place)
    found = [0, 0]
    for path, windows, ids in zip(paths, texts.values(), theirs, strict=True):
        text = path.read_text(encoding="utf-8")[: 16 * size]
        own = tokenizer.encode_template(text)
        expected = torch.cat(list(windows)).tolist()
        for number in range(len(windows)):
            part = slice(number * len(windows[0]), (number + 1) * len(windows[0]))
            found[0] += ids[part] == expected[part]
            found[1] += own[part] == expected[part]
    count = sum(map(len, texts.values()))
    return f"{found[0]}, {found[1]} of {count}"


def installed(file: Path, place: Path, options: QuantizeOptions) -> Path:
    """Install a GGUF file as `mixchat download` does."""
    with open_checkpoint(Source(str(file)), place, NoProgress()) as checkpoint:
        CheckpointBuild(checkpoint, place, make_blueprint(checkpoint.index, options)).run()
    return place


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--python", required=True)
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--windows", type=int, default=2, help="of each text")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(exist_ok=True)
    checkpoint, original = write_model(work), write_original(work)
    paths = write_texts(work / "texts", checkpoint)
    texts = {path.stem: windows_of(checkpoint, path, given.windows) for path in paths}
    measurement = Measurement(work, texts)
    plain = install(checkpoint, work / "plain", "none", 16)
    measurement.set_expected(measurement.of_mixchat(plain))
    print("| kind | bits | llama.cpp | as read | installed | tokens |", flush=True)
    print("| ---- | ---- | --------- | ------- | --------- | ------ |", flush=True)
    weights = sum(tensor.data.size for tensor in GGUFReader(original).tensors)
    for kind in given.kinds:
        file = work / f"{kind}.gguf"
        if not file.exists():
            command = [given.python, str(CHILD), "quantize", str(original), str(file), kind]
            subprocess.run(command, check=True, stdout=sys.stderr)
        is_copied = kind.startswith("MXFP4")
        read_as, made_as = ("mxfp4", "mxfp4") if is_copied else ("none", "nf4")
        read = installed(file, work / f"{kind}-16", QuantizeOptions(read_as, 16, 16))
        made = installed(file, work / f"{kind}-4", QuantizeOptions(made_as))
        cells = [
            kind,
            f"{8 * os.stat(file).st_size / weights:.1f}",
            measurement.figures(measurement.of_llama(given.python, file)),
            measurement.figures(measurement.of_mixchat(read)),
            measurement.figures(measurement.of_mixchat(made)),
            equal_tokens(given.python, file, made, paths, texts),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        file.unlink()


if __name__ == "__main__":
    main()
