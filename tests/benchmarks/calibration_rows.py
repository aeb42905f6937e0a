"""The loss of calibrated experts against the rows that they learn from, on the demo's weights.

    python tests/benchmarks/calibration_rows.py CALIBRATION TEXT ...
        [--rows 0.25 0.5 1 2 4 8] [--bits 4 3] [--windows 8] [--checkpoint DIRECTORY]

The demo's experts compute one function, so that one expert a layer is read as a dense model. Its 60
matrices are rounded as `mixchat calibrate` rounds them. Each gets so many rows a column, drawn
evenly from all windows of CALIBRATION, and a fifth of these rows is held out. No TEXT may be part
of CALIBRATION.

"3 bits" is as `--expert-bits 3` has it: w1 and w3 in 3 bits, w2 in 4. "before" is GPTQ as it was
before rows were held out: H is damped by 1% of its mean, and the result is always taken. For each
text: the KL divergence to the unquantized model in nats a token, and perplexity.

C = columns, n = inputs.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional
from torch_mixture import read_mixture
from transformers import LlamaForCausalLM

from mixchat.base.progress import NoProgress
from mixchat.install.make.calibrator import FOLD
from mixchat.install.source import demo
from mixchat.text.choose import load_tokenizer
from mixchat.weights.matrix import encode, gptq
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import Inputs, QuantType, Way

WINDOW = 256  # tokens
CALIBRATION_WINDOWS = 60  # 15,360 rows: ten for each of the 1,536 columns of w2
COLUMNS = {"w13": 576, "w2": 1536}
TYPES: dict[int, dict[str, QuantType]] = {
    4: {"w13": "nf4", "w2": "nf4"},
    3: {"w13": "trellis3", "w2": "trellis3"},
}

Key = tuple[int, str]  # a layer, and "w13" or "w2"
Round = Callable[[Key, torch.Tensor], torch.Tensor]  # a matrix to its rounded one


def matrices(model: LlamaForCausalLM) -> dict[Key, torch.Tensor]:
    """The matrices of the feed-forward blocks, as the experts of an installed model have them."""
    found = {}
    for number, layer in enumerate(model.model.layers):
        expert = layer.mlp.experts[0]
        found[number, "w13"] = torch.cat((expert.w1.weight, expert.w3.weight)).bfloat16()
        found[number, "w2"] = expert.w2.weight.bfloat16()
    return found


def replace_matrices(model: LlamaForCausalLM, made: dict[Key, torch.Tensor]) -> None:
    """Give the model these matrices."""
    for number, layer in enumerate(model.model.layers):
        expert = layer.mlp.experts[0]
        expert.w1.weight.data, expert.w3.weight.data = made[number, "w13"].chunk(2)
        expert.w2.weight.data = made[number, "w2"]


def record(model: LlamaForCausalLM, windows: torch.Tensor) -> dict[Key, torch.Tensor]:
    """The inputs of each matrix while the model reads these windows: bf16 [n, C]."""
    rows: dict[Key, list[torch.Tensor]] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers):
        expert = layer.mlp.experts[0]
        for name, linear in (("w13", expert.w1), ("w2", expert.w2)):

            def add(_: object, given: tuple[torch.Tensor], key: Key = (number, name)) -> None:
                rows.setdefault(key, []).append(given[0].bfloat16())

            hooks.append(linear.register_forward_pre_hook(add))
    for window in windows:
        model.model(window[None])
    for hook in hooks:
        hook.remove()
    return {key: torch.cat(parts) for key, parts in rows.items()}


def rounded(kind: QuantType, weight: torch.Tensor, inputs: Inputs | None) -> torch.Tensor:
    """The matrix with codes of this type."""
    spec = LinearSpec("w", *weight.shape, kind, torch.bfloat16, "search")
    return spec.build(spec.encode(weight, inputs))(torch.eye(weight.shape[1])).T.contiguous()


def undamped(inputs: torch.Tensor) -> gptq.Feedback:
    """The factors as they were before: H damped by 1% of its mean."""
    hessian = inputs.float().T @ inputs.float() / len(inputs)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    correlations, sizes = hessian.flip(0, 1), hessian.diagonal().sqrt()
    triangle = torch.linalg.cholesky(correlations).flip(0, 1)
    diagonal = triangle.diagonal()
    correlations = correlations / sizes.flip(0) / sizes.flip(0).unsqueeze(-1)
    return gptq.Feedback(triangle / diagonal, diagonal.square(), correlations, sizes)


@contextlib.contextmanager
def before() -> Iterator[None]:
    """Round as before: what is held out has been seen, so that GPTQ always wins."""
    with mock.patch.object(encode, "feedback_of", undamped):
        yield


class Ways:
    """Rounds matrices in all the ways that are compared."""

    def __init__(self, rows: dict[Key, torch.Tensor]) -> None:
        self._rows, self.taken = rows, Counter[str]()

    def _some(self, key: Key, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return so many rows a column from all windows, and their windows."""
        every, wanted = self._rows[key], round(ratio * COLUMNS[key[1]])
        places = torch.linspace(0, len(every) - 1, min(wanted, len(every))).long()
        return every[places], places // WINDOW

    def plain(self, bits: int) -> Round:
        return lambda key, weight: rounded(TYPES[bits][key[1]], weight, None)

    def before(self, bits: int, ratio: float) -> Round:
        def make(key: Key, weight: torch.Tensor) -> torch.Tensor:
            rows, _ = self._some(key, ratio)
            with before():
                inputs = Inputs(rows, rows[:: len(rows) // 128 + 1], lambda *_: None)
                return rounded(TYPES[bits][key[1]], weight, inputs)

        return make

    def calibrated(self, bits: int, ratio: float) -> Round:
        self.taken.clear()

        def note(way: Way, *_: float) -> None:
            self.taken[way] += 1

        def make(key: Key, weight: torch.Tensor) -> torch.Tensor:
            rows, windows = self._some(key, ratio)
            last = windows % FOLD == FOLD - 1
            inputs = Inputs(rows[~last], rows[last], note)
            return rounded(TYPES[bits][key[1]], weight, inputs)

        return make


class Meter:
    """Measures a model with the windows of some texts."""

    def __init__(self, model: LlamaForCausalLM, texts: Sequence[torch.Tensor]) -> None:
        self._model, self._texts = model, texts
        self._base = [[self._scores(window) for window in text] for text in texts]
        self.unquantized = [self._perplexity(*pair) for pair in zip(texts, self._base, strict=True)]

    def _scores(self, window: torch.Tensor) -> torch.Tensor:
        return self._model(window[None]).logits[0, :-1].log_softmax(-1)

    @staticmethod
    def _perplexity(windows: torch.Tensor, scores: Sequence[torch.Tensor]) -> float:
        pairs = zip(windows, scores, strict=True)
        losses = [functional.nll_loss(row, window[1:]).item() for window, row in pairs]
        return math.exp(sum(losses) / len(losses))

    def cells(self) -> list[str]:
        """Return KL divergence and perplexity on each text."""
        found = []
        for windows, base in zip(self._texts, self._base, strict=True):
            scores = [self._scores(window) for window in windows]
            each = [
                functional.kl_div(one, exact, reduction="batchmean", log_target=True).item()
                for one, exact in zip(scores, base, strict=True)
            ]
            found += [f"{sum(each) / len(each):.4f}", f"{self._perplexity(windows, scores):.2f}"]
        return found


def cut(checkpoint: Path, text: Path, windows: int) -> torch.Tensor:
    """The first tokens of a text, in windows."""
    ids = load_tokenizer(checkpoint).encode(text.read_text(encoding="utf-8", errors="replace"))
    if len(ids) < windows * WINDOW:
        raise SystemExit(f"{text} has {len(ids)} tokens: {windows * WINDOW} are needed")
    return torch.tensor(ids[: windows * WINDOW]).view(windows, WINDOW)


@torch.inference_mode()
def compare(checkpoint: Path, given: argparse.Namespace) -> None:
    """Print the table, a row as soon as it is known."""
    model = read_mixture(checkpoint, experts=1)
    meter = Meter(model, [cut(checkpoint, text, given.windows) for text in given.texts])
    exact = matrices(model)
    ways = Ways(record(model, cut(checkpoint, given.calibration, CALIBRATION_WINDOWS)))
    heads = ["bits", "rows a column", "way", "GPTQ, weighted, plain"]
    heads += [f"{text.stem}: {what}" for text in given.texts for what in ("KL", "perplexity")]
    print(f"| {' | '.join(heads)} |\n|{' ---: |' * len(heads)}")

    def show(bits: int, ratio: str, way: str, make: Round) -> None:
        replace_matrices(model, {key: make(key, weight).float() for key, weight in exact.items()})
        taken = ", ".join(str(ways.taken[name]) for name in ("gptq", "weighted", "plain"))
        cells = [str(bits), ratio, way, taken if way == "calibrated" else "", *meter.cells()]
        print(f"| {' | '.join(cells)} |", flush=True)

    perplexities = [cell for value in meter.unquantized for cell in ("0", f"{value:.2f}")]
    print(f"| {' | '.join(['16', '', 'unquantized', '', *perplexities])} |", flush=True)
    for bits in given.bits:
        show(bits, "", "plain", ways.plain(bits))
        for ratio in given.rows:
            show(bits, f"{ratio:g}", "before", ways.before(bits, ratio))
            show(bits, f"{ratio:g}", "calibrated", ways.calibrated(bits, ratio))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calibration", type=Path, metavar="CALIBRATION")
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--rows", type=float, nargs="+", default=[0.25, 0.5, 1, 2, 4, 8])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3], choices=list(TYPES))
    parser.add_argument("--windows", type=int, default=8, help="of each text")
    parser.add_argument("--checkpoint", type=Path, help="the demo's, instead of building it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        checkpoint = given.checkpoint
        if checkpoint is None:
            checkpoint = Path(work) / "checkpoint"
            demo.build_checkpoint(checkpoint, NoProgress())
        compare(checkpoint, given)


if __name__ == "__main__":
    main()
