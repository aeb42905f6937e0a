"""Takes the demo's equal experts apart, so that its router has something to choose.

    python tests/benchmarks/part_experts.py WORK [--steps 12]

The demo's experts compute one function. Here each becomes a copy of the dense feed-forward blocks
that is trained on one kind of text (`KINDS`), with all else as it was. Then each layer's router
learns to tell the kinds apart by the inputs of the experts. The same seed gives the same experts on
the same machine. WORK is the directory of `quality.py`, and its model is the one that is trained.
The same command continues with what is not done yet.

Writes WORK/parted, a Mixtral checkpoint of eight experts, top 2. `quality.py OTHER --checkpoint
WORK/parted` measures it. No text of `quality_texts.py` is trained on. A table shows on text that
was held out, by its kind:

- the perplexity of the dense model, of the kind's own expert for all tokens, of the seven others,
  and of the mixture
- the KL divergence of the others from the own expert, in nats a token
- how often the own expert is the router's first choice, and how often one of its two
- the entropy of the router's eight weights, in nats (2.08 if all are alike)

D = hidden size, E = experts, N = tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import json
import math
import re
import shutil
import statistics
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from quality_forms import write_model
from quality_texts import LICENCES, fetch_packages
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch_mixture import WEIGHTS, read_mixture
from transformers import AutoTokenizer, LlamaForCausalLM

WINDOW = 512  # tokens
HELD_OUT = 4  # windows of a kind, that no expert learns from
REPORTED = 2  # of the windows that were held out
BATCH = 1  # windows of a step
RATE = 8e-4
CHOICES = 2
ROUTER_WINDOWS = 6  # of each kind
ROUTER_STEPS = 120
LETTERS = 400_000  # of a kind
PACKAGES = "fortunes", "manpages-de", "manpages-fr"
NO_TEXT = ".dat", ".u8"  # beside Debian's fortunes: an index, and the same text again


def _files(pattern: str, root: Path, *without: str) -> Iterator[str]:
    """Yield the texts of files, in the order of their names."""
    for path in sorted(root.glob(pattern)):
        if path.is_file() and path.name not in without and path.suffix not in NO_TEXT:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            yield raw.decode("utf-8", "replace")


def manual(pages: Iterable[str]) -> Iterator[str]:
    """Yield the text of manual pages without the marks of roff."""
    for page in pages:
        lines = (line for line in page.splitlines() if not line.startswith((".\\", "'\\", ".if")))
        text = "\n".join(re.sub(r"^\.[A-Za-z]+ ?", "", line) for line in lines)
        yield re.sub(r"\\f.|\\&", "", text).replace("\\-", "-").replace("\\(aq", "'")


def kinds(work: Path) -> dict[str, Iterator[str]]:
    """Return the texts of each kind. `work` has the packages' files."""
    usr, python = Path("/usr"), Path(sysconfig.get_path("stdlib"))
    return {
        "Python": _files("*.py", python, "tarfile.py"),
        "C": _files("include/linux/*.h", usr),
        "licences": _files("[!G]*", LICENCES, "Apache-2.0", "AGPL-3.0", "LGPL", "LGPL-3"),
        "quotations": _files("usr/share/games/fortunes/[!p]*", work),
        "German": manual(_files("usr/share/man/de/man1/*", work)),
        "French": manual(_files("usr/share/man/fr/man1/*", work)),
        "manual": manual(_files("share/man/man1/*", usr)),
        "Perl": _files("share/perl/5*/**/*.pm", usr),
    }


def read_kinds(work: Path, checkpoint: Path) -> dict[str, Tensor]:
    """Return the windows of each kind, [n, WINDOW]. The last ones are held out."""
    folder, found = work / "kinds", {}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    folder.mkdir(exist_ok=True)
    fetch_packages(folder, PACKAGES)
    for name, texts in kinds(folder).items():
        path = folder / f"{name}.txt"
        if not path.exists():
            path.write_text(_some(texts), encoding="utf-8")
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False).input_ids
        found[name] = torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)
    return found


def _some(texts: Iterator[str]) -> str:
    """Return the first letters of texts. No text gives more than a tenth of them."""
    found, size = [], 0
    while size < LETTERS and (text := next(texts, None)) is not None:
        found.append(text[: LETTERS // 10])
        size += len(found[-1])
    return "\n".join(found)


def loss_of(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Return the mean loss of the tokens of windows [n, WINDOW]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows).logits[:, :-1]
    return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def expert_of(model: LlamaForCausalLM) -> dict[str, nn.Parameter]:
    """Return the matrices of a model's only expert."""
    return {name: value for name, value in model.named_parameters() if ".experts." in name}


def train_expert(model: LlamaForCausalLM, windows: Tensor, steps: int, seed: int) -> None:
    """Train the feed-forward blocks on windows [n, WINDOW]. The rate falls to 0."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(expert_of(model).values(), lr=RATE, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 2, 1) * (1 - step / steps)
        batch = windows[torch.randint(len(windows), (BATCH,), generator=random)]
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(expert_of(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"  step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


def expert_file(work: Path, kind: str) -> Path:
    return work / f"expert-{kind}.safetensors"


def make_experts(work: Path, model: LlamaForCausalLM, texts: dict[str, Tensor], steps: int) -> None:
    """Write an expert for each kind, if it is not there. The model is the dense one again."""
    exact = {name: value.detach().bfloat16() for name, value in expert_of(model).items()}
    for name, value in model.named_parameters():
        value.requires_grad_(name in exact)
    for seed, (kind, windows) in enumerate(texts.items()):
        path = expert_file(work, kind)
        if path.exists():
            continue
        print(kind, flush=True)
        train_expert(model, windows[:-HELD_OUT], steps, seed)
        made = {name: value.detach().bfloat16() for name, value in expert_of(model).items()}
        save_file(made, unfinished := path.with_suffix(".part"))
        unfinished.rename(path)
        use(model, exact)


def use(model: LlamaForCausalLM, expert: dict[str, Tensor]) -> None:
    """Give the model the matrices of an expert."""
    for name, value in expert_of(model).items():
        value.data.copy_(expert[name])


def inputs_of(model: LlamaForCausalLM, windows: Tensor) -> list[Tensor]:
    """Return the inputs of each layer's router, [N, D], for windows [n, WINDOW]."""
    rows: list[list[Tensor]] = [[] for _ in model.model.layers]
    with contextlib.ExitStack() as hooks:
        for layer, to in zip(model.model.layers, rows, strict=True):
            add = functools.partial(_add, to)
            hooks.callback(layer.mlp.gate.register_forward_pre_hook(add).remove)
        with torch.autocast("cpu", torch.bfloat16):
            for window in windows:
                model.model(window[None])
    return [torch.cat(parts) for parts in rows]


def _add(rows: list[Tensor], _: nn.Module, given: tuple[Tensor]) -> None:
    rows.append(given[0].bfloat16())


def log_probabilities(model: LlamaForCausalLM, window: Tensor) -> Tensor:
    """Return the log probabilities of the tokens that follow one in a window, [N, V]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(window[None]).logits[0, :-1]
    return logits.float().log_softmax(-1)


def train_router(inputs: Tensor, kind: Tensor, count: int) -> Tensor:
    """Return a router [E, D] that tells the kinds [N] of inputs [N, D] apart."""
    scale = inputs.float().pow(2).mean().sqrt()
    x, router = inputs.float() / scale, nn.Parameter(torch.zeros(count, inputs.shape[1]))
    optimizer = torch.optim.AdamW([router], lr=0.02, weight_decay=0.05)
    for _ in range(ROUTER_STEPS):
        optimizer.zero_grad()
        functional.cross_entropy(x @ router.T, kind).backward()
        optimizer.step()
    return router.detach() / scale


def make_routers(work: Path, model: LlamaForCausalLM, texts: dict[str, Tensor]) -> list[Tensor]:
    """Return each layer's router, if it is not there: each kind is read by its own expert."""
    path = work / "routers.safetensors"
    if not path.exists():
        rows = []
        with torch.no_grad():
            for kind, windows in texts.items():
                use(model, load_file(expert_file(work, kind)))
                rows.append(inputs_of(model, windows[:ROUTER_WINDOWS]))
        kinds = torch.arange(len(texts)).repeat_interleave(len(rows[0][0]))
        layers = zip(*rows, strict=True)
        made = [train_router(torch.cat(parts), kinds, len(texts)) for parts in layers]
        save_file({str(number): router for number, router in enumerate(made)}, path)
    found = load_file(path)
    return [found[str(number)] for number in range(len(found))]


def write_parted(work: Path, checkpoint: Path, kinds: Sequence[str], routers: list[Tensor]) -> Path:
    """Write the mixture of the experts as a checkpoint."""
    target = work / "parted"
    if target.exists():
        return target
    unfinished = work / "parted.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(checkpoint, unfinished, ignore=lambda *_: [WEIGHTS])
    config = json.loads((checkpoint / "config.json").read_bytes())
    config |= {"num_local_experts": len(kinds), "num_experts_per_tok": CHOICES}
    (unfinished / "config.json").write_text(json.dumps(config))
    state = {
        name: value
        for name, value in load_file(checkpoint / WEIGHTS).items()
        if ".experts." not in name
    }
    for layer, router in enumerate(routers):
        state[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router.bfloat16()
    for number, kind in enumerate(kinds):
        for name, value in load_file(expert_file(work, kind)).items():
            name = name.replace(".mlp.experts.0.", f".block_sparse_moe.experts.{number}.")
            state[name] = value
    save_file(state, unfinished / WEIGHTS)
    unfinished.rename(target)
    return target


class Report:
    """Measures dense model, experts and mixture on the windows of each kind that were held out."""

    def __init__(self, work: Path, texts: dict[str, Tensor]) -> None:
        self._work = work
        self._texts = {kind: windows[-REPORTED:] for kind, windows in texts.items()}

    def losses(self, model: LlamaForCausalLM) -> list[float]:
        """Return a model's loss on each kind."""
        return [
            statistics.mean(loss_of(model, window[None]).item() for window in windows)
            for windows in self._texts.values()
        ]

    def experts(self, model: LlamaForCausalLM) -> tuple[Tensor, Tensor]:
        """Return by kind and expert its loss, and the KL divergence from the kind's own expert."""
        made = [load_file(expert_file(self._work, kind)) for kind in self._texts]
        losses, apart = (torch.zeros(len(made), len(made)) for _ in range(2))
        for row, windows in enumerate(self._texts.values()):
            for window in windows:
                every = []
                for expert in made:
                    use(model, expert)
                    every.append(log_probabilities(model, window))
                for column, scores in enumerate(every):
                    losses[row, column] += functional.nll_loss(scores, window[1:]) / REPORTED
                    divergence = functional.kl_div(
                        scores, every[row], reduction="batchmean", log_target=True
                    )
                    apart[row, column] += divergence / REPORTED
        return losses, apart

    def routing(self, mixture: LlamaForCausalLM) -> Iterator[tuple[float, float, float]]:
        """Yield of each kind how often its expert is the first choice, one of both, and entropy."""
        gates = [layer.mlp.gate.weight.float() for layer in mixture.model.layers]
        for number, windows in enumerate(self._texts.values()):
            inputs = inputs_of(mixture, windows)
            pairs = zip(inputs, gates, strict=True)
            logits = torch.stack([rows.float() @ gate.T for rows, gate in pairs])
            chosen = logits.topk(CHOICES).indices == number
            shares = logits.softmax(-1)
            entropy = -(shares * shares.clamp(min=1e-9).log()).sum(-1).mean().item()
            first = chosen[..., 0].float().mean().item()
            yield first, chosen.any(-1).float().mean().item(), entropy


@torch.no_grad()
def report(work: Path, checkpoint: Path, parted: Path, texts: dict[str, Tensor]) -> None:
    """Print the table that the module's text describes."""
    measures, dense = Report(work, texts), read_mixture(checkpoint, dtype=torch.bfloat16)
    before = measures.losses(dense)
    losses, apart = measures.experts(dense)
    del dense
    mixture = read_mixture(parted, dtype=torch.bfloat16)
    after = measures.losses(mixture)
    heads = "kind", "before", "own expert", "others", "mixture", "KL", "first", "chosen", "entropy"
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    others = len(texts) - 1
    for row, (kind, routed) in enumerate(zip(texts, measures.routing(mixture), strict=True)):
        own = losses[row, row].item()
        rest = (losses[row].sum().item() - own) / others
        shown = [f"{math.exp(loss):.2f}" for loss in (before[row], own, rest, after[row])]
        shown += [f"{apart[row].sum().item() / others:.3f}"]
        shown += [f"{routed[0]:.0%}", f"{routed[1]:.0%}", f"{routed[2]:.2f}"]
        print(f"| {kind} | {' | '.join(shown)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--steps", type=int, default=12, help="of each expert")
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(exist_ok=True)
    checkpoint = write_model(work)
    texts, model = read_kinds(work, checkpoint), read_mixture(checkpoint)
    make_experts(work, model, texts, given.steps)
    routers = make_routers(work, model, texts)
    del model
    parted = write_parted(work, checkpoint, list(texts), routers)
    report(work, checkpoint, parted, texts)


if __name__ == "__main__":
    main()
