"""Tells the steps of tests/gpu.sh where they are, and gives them models and programs to run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

TOOLS = Path(__file__).resolve().parent
TESTS = TOOLS.parent
ROOT = TESTS.parent
LEFT_OUT = 77  # a step's exit status if it says why it cannot be done here
SECONDS = 3600.0  # of all steps
GB = 10**9
SPEED_SHAPES = ("instruct", "qwen3")


@dataclass(frozen=True)
class Trial:
    """What steps are told. folder: of the models that they write. gigabytes: of each of them."""

    paper: bool
    folder: Path
    gigabytes: float
    llama: str
    report: Path

    @property
    def device(self) -> Any:
        import torch

        from mixchat.base import gpu

        return torch.device(gpu.KIND, 0)

    @property
    def shapes(self) -> Sequence[str]:
        """Return the known models whose shapes are measured. A GPU on paper has a tiny one."""
        return SPEED_SHAPES[: 1 if self.paper else None]


class LeftOutError(Exception):
    """A step cannot be done on this machine."""


class Step(NamedTuple):
    """`run` prints figures, a line each."""

    name: str
    proves: str
    limit_s: int
    run: Callable[[Trial], None]


def run_pytest(*arguments: str, before: Sequence[str] = (), **variables: str) -> None:
    """Run tests, and print the last line and what failed. before: a program that starts Python."""
    # The suite makes errors of warnings, and CUDA's runtime may give some.
    flags = ["-q", "-p", "no:cacheprovider", "-W", "default"]
    command = [*before, sys.executable, "-m", "pytest", *flags, *arguments]
    environment = {key: item for key, item in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment | variables
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", file=sys.stderr, flush=True)
        last = line.strip() or last
        if line.startswith(("FAILED", "ERROR")):
            print(line.strip())
    print(last)
    if process.wait():
        raise SystemExit(1)


class Model(NamedTuple):
    """A model with a part of the layers of a known one. `share`: of its layers."""

    directory: Path
    shape: str
    layers: int
    share: float

    @property
    def told(self) -> str:
        return f"{self.shape}, {self.layers} of {round(self.layers / self.share)} layers"


def run_bench(
    trial: Trial, model: Model, name: str, size: str | None, device: str = "cuda:0"
) -> bool:
    """Print measured speeds beside what the plan predicts. Return whether they could be."""
    few = ["--prompt", "16", "--tokens", "4"] if trial.paper else []
    rounds = ["--rounds", "1" if trial.paper else "3"]
    size = "2GB" if size is None and trial.paper else size  # or the CPU may be chosen
    common = ["--json", *device_flags(trial, device), *(["--device-memory", size] if size else [])]
    context = ["--ctx-size", "576"]  # as bench takes for a prompt of 512 tokens
    planned = run_mixchat(trial, "plan", model.directory, *common, *context)
    measured = run_mixchat(trial, "bench", model.directory, *common, *rounds, *few)
    for done in (planned, measured):
        if done.returncode:
            print(f"  {name}: exit {done.returncode}: {done.stderr.strip()[-200:]}")
            return False
    found, plan = json.loads(measured.stdout), json.loads(planned.stdout)
    rates = [
        f"{task['name']} {median(task['mixchat']):.1f} tok/s ({task['of_limit']:.0%} of the limit)"
        for task in found["tasks"]
    ]
    rate = plan["tokens_per_second"]
    told = "none" if rate is None else f"decode {rate:.1f} tok/s"
    for prompt in plan["prompts"]:
        told += f", prompt of {prompt['tokens']} {prompt['tokens'] / prompt['seconds']:.0f} tok/s"
    print(f"  {name}: {', '.join(rates)}; plan: {told}; slots {found['slots']}")
    return True


def model_of(trial: Trial, shape: str) -> Model:
    """Write a model with as many layers as fit, unless it is there."""
    from mixchat.bench.synthetic import write_synthetic
    from mixchat.install.known_models import KNOWN
    from mixchat.install.make.quantize_options import default_blueprint
    from mixchat.weights.families.read_config import read_config

    known = KNOWN[shape]
    total: int = known.config["num_hidden_layers"]
    if trial.paper:
        config = tiny_config()
        directory = random_model(trial, "tiny", config)
        return Model(directory, "tiny", config["num_hidden_layers"], 1.0)
    most = min(trial.gigabytes * GB, shutil.disk_usage(trial.folder).free / 3)

    def size(layers: int) -> int:
        config = read_config(known.with_layers(layers))
        return default_blueprint(config, known.experts_quant_type or "nf4", None).size

    # A model that is there was written with the same bytes, or the folder is another.
    there = [path for path in trial.folder.glob(f"{shape}-*") if path.is_dir()]
    layers = int(there[-1].name.rsplit("-", 1)[1]) if there else total
    while not there and layers > 1 and size(layers) > most:
        layers -= 1
    directory = trial.folder / f"{shape}-{layers}"
    if not there:
        unfinished = trial.folder / f"unfinished-{shape}"
        shutil.rmtree(unfinished, ignore_errors=True)
        write_synthetic(unfinished, layers, shape=shape)
        unfinished.rename(directory)
    return Model(directory, shape, layers, layers / total)


def few_layers(trial: Trial, shape: str, layers: int) -> Model:
    """Write a few layers of a known model, unless they are there."""
    from mixchat.bench.synthetic import write_synthetic

    if trial.paper:
        return model_of(trial, shape)
    directory = trial.folder / f"few-{shape}"
    if not directory.exists():
        write_synthetic(directory, layers, shape=shape)
    return Model(directory, f"{layers} layers of {shape}", layers, 1.0)


def tiny_config() -> dict[str, Any]:
    from paper_tools import TINY

    return {**TINY, "max_position_embeddings": 8192}


def random_model(trial: Trial, name: str, config: dict[str, Any]) -> Path:
    """Write a random model, for which fp32 lets no choice between two tokens hang on rounding."""
    import torch

    from mixchat.bench.synthetic import write_random
    from mixchat.weights.families.read_config import read_config
    from mixchat.weights.format.blueprint import Blueprint, Quantization

    directory = trial.folder / name
    shutil.rmtree(directory, ignore_errors=True)
    form = Quantization("none", dtype=torch.float32)
    write_random(directory, config, Blueprint(read_config(config), form))
    return directory


def device_flags(trial: Trial, name: str = "cuda:0") -> list[str]:
    """Return flags for a device. GPUs on paper have no name that the command line takes."""
    return [] if trial.paper else ["--device", name]


def run_mixchat(trial: Trial, *arguments: Any) -> subprocess.CompletedProcess[str]:
    program = [str(TOOLS / "gpu_steps.py"), "--mixchat"] if trial.paper else ["-m", "mixchat"]
    command = [sys.executable, *program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"$ {' '.join(command)}\n{done.stdout}{done.stderr}", file=sys.stderr)
    return done
