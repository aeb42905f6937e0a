"""Steps of tests/gpu.sh that tell what a card is like, and what it computes in a whole model.

Imports of torch are in the steps, each of which is a process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from gpu_trial import (
    GB,
    TESTS,
    LeftOutError,
    Model,
    Trial,
    device_flags,
    few_layers,
    model_of,
    run_mixchat,
    run_pytest,
)

_LEAST_COSINE = 0.99  # of the GPU's logits and the CPU's, which round bf16 at other places
_TRIES = 50


def card(trial: Trial) -> None:
    """Print the versions, then capture and replay a graph with a copy to the host."""
    import torch
    import triton

    from mixchat.base import gpu

    for number in range(gpu.count()):
        device = torch.device(gpu.KIND, number)
        size = gpu.total_memory(device) / GB
        version = gpu.capability(device)
        print(f"{device}: {gpu.name(device)}, {size:.1f} GB, compute capability {version}")
    runtime = torch.version.hip or torch.version.cuda
    print(f"driver {_driver()}, runtime {runtime}, torch {torch.__version__}", end=", ")
    print(f"triton {triton.__version__}, Python {platform.python_version()}")
    print(f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}")
    device = trial.device
    x = torch.zeros(1024, device=device)
    host = gpu.locked_block(x.nbytes, device).view(x.dtype)

    def work() -> None:
        x.add_(1)
        host.copy_(x, non_blocking=True)

    with gpu.current(device), torch.inference_mode():
        work()
        with gpu.captured(device) as graph:
            work()
        graph.replay()
        gpu.synchronize(device)
    if not bool((host == 2).all()):
        raise SystemExit(f"a graph computed {host[0]} and not 2")
    print("a graph with a copy to page-locked RAM was captured and replayed")


def _driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return ", ".join(sorted(set(told.split())))


def latency(trial: Trial) -> None:
    """Print what a plan assumes of a card that was not measured, beside what this card takes."""
    import torch

    from mixchat.base import gpu
    from mixchat.planning.cards import Card, find_card
    from mixchat.planning.gpu_speed import graph_seconds, measure_gpu
    from mixchat.planning.machine_speeds import KERNEL_S, ROUND_TRIP_S, GPUSpeeds

    device = trial.device
    x = torch.zeros(1024, device=device)
    with gpu.current(device), torch.inference_mode():
        kernel, round_trip = graph_seconds(device)
        x.add_(1)
        with gpu.captured(device) as graph:
            x.add_(1)
        launch = _host_seconds(graph.replay, device)
        start = _host_seconds(lambda: x.add_(1), device)
        told = f"{kernel * 1e6:.1f} us a kernel of a graph (assumed {KERNEL_S * 1e6:.1f})"
        print(f"{told}, {round_trip * 1e6:.1f} a round trip (assumed {ROUND_TRIP_S * 1e6:.0f})")
        print(f"the host takes {launch * 1e6:.1f} us to launch a graph", end=", ")
        print(f"{start * 1e6:.1f} a kernel, {(round_trip - launch) * 1e6:.1f} until it wakes up")
        if trial.paper:  # whose products would take minutes
            return
        measured = measure_gpu(device)
    memory = gpu.total_memory(device)
    sheet = GPUSpeeds.of_card(find_card(gpu.name(device), memory) or Card.of_size(memory))
    for name in ("memory", "bus", "compute", "lanes"):
        found, assumed = getattr(measured, name), getattr(sheet, name)
        print(f"{name}: {found:.3g} a second, {found / assumed:.2f} of what the plan assumes")


def _host_seconds(start: Callable[[], object], device: Any) -> float:
    """Return the seconds in which the host starts something, without its end."""
    from mixchat.base import gpu

    seconds = []
    for _ in range(_TRIES):
        gpu.synchronize(device)
        begin = time.perf_counter()
        start()
        seconds.append(time.perf_counter() - begin)
    gpu.synchronize(device)
    return median(seconds)


def sanitizer(trial: Trial) -> None:
    """Run tests of kernels under CUDA's tools that find faults of memory and races."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise LeftOutError("there is no compute-sanitizer, which CUDA's toolkit has")
    # A kernel takes some hundred times as long. Types differ in what they load.
    chosen = "nf4" if trial.paper else "nf4 or trellis3 or route or norm or heads"
    device = "cpu" if trial.paper else "cuda"
    folder = TESTS / "kernels" / "gpu"
    files = [f"{folder}/test_expert_kernels.py"]
    if not trial.paper:
        files = [f"--ignore={folder}/test_gpu_assembly.py", str(folder)]
    for tool in ("memcheck", "racecheck"):
        before = [program, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
        print(f"{tool}:")
        run_pytest(*files, "-x", "-k", chosen, before=before, MIXCHAT_TEST_GPU=device)


@contextmanager
def _loaded(trial: Trial, model: Model, **options: Any) -> Iterator[Any]:
    """Load a model without speculation, on the GPU if no device is named."""
    from mixchat.base.options import LoadOptions
    from mixchat.loading.loader import load_engine

    options = {"device": str(trial.device), "speculation": False} | options
    engine = load_engine(model.directory, LoadOptions(**options))
    try:
        while engine.experts.is_filling:
            time.sleep(0.05)
        yield engine
    finally:
        engine.close()


def logits(trial: Trial) -> None:
    """Compare logits of a prompt without graphs and of tokens by graphs with the CPU's."""
    from mixchat.base.quantities import MemoryBudget

    length, tokens = (16, 2) if trial.paper else (256, 8)
    for shape in trial.shapes if trial.paper else (*trial.shapes, "gpt-oss"):
        model = few_layers(trial, shape, 2)
        context = length + tokens + 16
        expected = _logits(trial, model, length, tokens, context_size=context, device="cpu")
        for place, part in {"all in VRAM": 1.0, "half in RAM": 0.5}.items():
            budget = (MemoryBudget(size=_bytes_with(model.directory, part, context)),)
            found = _logits(
                trial, model, length, tokens, context_size=context, device_memory=budget
            )
            _compare(f"{model.told}, {place}", found, expected)


def _bytes_with(directory: Path, part: float, context: int) -> int:
    """Return the VRAM of a model with a part of its experts, and two that a prompt carries."""
    from mixchat.base.options import LoadOptions
    from mixchat.planning.fitting import FreeMemory, fit_model
    from mixchat.weights.format.installed_model import InstalledModel

    with InstalledModel(directory) as installed:
        options = LoadOptions(context_size=context)
        demand = fit_model(installed.blueprint, FreeMemory(10**13, 10**13), options).demand
    return demand.beside_experts + (int(part * demand.experts) + 2) * demand.expert


def _logits(trial: Trial, model: Model, length: int, tokens: int, **options: Any) -> list[Any]:
    """Return the logits of a prompt, and of each token after it."""
    import torch

    with _loaded(trial, model, **options) as engine, torch.inference_mode():
        forward, cache = engine.passes.model.forward, engine.held()[1]
        passes = [torch.arange(5, 5 + length) % 80, *torch.arange(40, 40 + tokens).split(1)]
        return [forward(ids, cache)[-1].float().cpu() for ids in passes]


def _compare(name: str, found: list[Any], expected: list[Any]) -> None:
    import torch

    cosines = [
        float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0))
        for ours, theirs in zip(found, expected, strict=True)
    ]
    pairs = [*zip(found, expected, strict=True)]
    same = sum(bool(ours.argmax() == theirs.argmax()) for ours, theirs in pairs)
    print(f"{name}: cosine of the prompt's logits {cosines[0]:.5f}", end=", ")
    print(f"of {len(cosines) - 1} tokens' {min(cosines[1:]):.5f}; {same} of {len(pairs)} choices")
    if not min(cosines) > _LEAST_COSINE:
        raise SystemExit(f"{name}: other logits than the CPU's")


def contexts(trial: Trial) -> None:
    """Print the speed of a token after short and long contexts, and the plan's."""
    failed = False
    for shape in trial.shapes:
        model = model_of(trial, shape)
        for depth in (16, 48) if trial.paper else (512, 8192, 32000):
            told = _after(trial, model, depth)
            print(f"{model.told}, after {depth:,} tokens: {told or 'failed'}")
            failed |= told is None
    if failed:
        raise SystemExit("a bench failed")


def _after(trial: Trial, model: Model, depth: int) -> str | None:
    """Return the speed after a context, and the plan's, None if they cannot be told."""
    common = ["--json", *device_flags(trial)]
    effort = ["--rounds", "3", "--prompt", "512", "--tokens", "64"]
    if trial.paper:
        common += ["--device-memory", "2GB"]
        effort = ["--rounds", "1", "--prompt", "16", "--tokens", "4"]
    measured = run_mixchat(trial, "bench", model.directory, *common, *effort, "--depth", depth)
    planned = run_mixchat(trial, "plan", model.directory, *common, "--ctx-size", depth)
    if measured.returncode or planned.returncode:
        return None
    tasks = {task["name"]: median(task["mixchat"]) for task in json.loads(measured.stdout)["tasks"]}
    decode = next(rate for name, rate in tasks.items() if name.startswith("decode"))
    plan = json.loads(planned.stdout)["tokens_per_second_at_full_context"]
    return f"{decode:.1f} tok/s; plan: {plan:.1f} tok/s"


def answers(trial: Trial) -> None:
    """Print the speed of one, two and four answers at once, together."""
    from together import decode

    tokens = 4 if trial.paper else 64
    for shape in trial.shapes:
        model = model_of(trial, shape)
        with _loaded(trial, model, parallel=4, context_size=tokens + 64) as engine:
            rates = {count: decode(engine, count, tokens) for count in (1, 2, 4)}
        told = (f"{count} at once {rate:.1f} tok/s" for count, rate in rates.items())
        print(f"{model.told}: {', '.join(told)}; four take {4 * rates[1] / rates[4]:.2f} times one")


def long(trial: Trial) -> None:
    """Answer with many tokens, and print how the speed and the memory change."""
    from mixchat.base import gpu
    from mixchat.base.options import SamplingOptions

    count, window = (24, 8) if trial.paper else (2000, 200)
    model = model_of(trial, trial.shapes[-1])
    with _loaded(trial, model, context_size=count + 64) as engine:
        times = [time.perf_counter()]
        free = []
        sampling = SamplingOptions(temperature=0)
        for _ in engine.generate([5, 6, 7], sampling=sampling, stop_ids=set(), max_tokens=count):
            times.append(time.perf_counter())
            free.append(gpu.free_memory(trial.device))
    first, last = times[window] - times[1], times[-1] - times[-window]
    print(f"{model.told}, {len(free)} tokens: {(window - 1) / first:.1f} tok/s", end=" at first, ")
    print(f"{(window - 1) / last:.1f} at last; {free[window] - free[-1]} bytes of VRAM were taken")
    if len(free) != count:
        raise SystemExit(f"{len(free)} tokens came, not {count}")
    if free[window] - free[-1] > GB // 10:
        raise SystemExit("VRAM leaks")


def others(trial: Trial) -> None:
    """Print the times of bitsandbytes' product and of torch's attention beside ours."""
    import torch
    from gpu_bandwidth import beside_sdpa, nf4_seconds

    from mixchat.base import gpu

    device = trial.device
    shapes = [(64, 64)] if trial.paper else [(5120, 2048), (28672, 4096)]
    reason = "on a GPU on paper" if trial.paper else "it is not installed"
    has_peer = not trial.paper and importlib.util.find_spec("bitsandbytes") is not None
    with gpu.current(device), torch.inference_mode():
        for rows, columns in shapes:
            ours = nf4_seconds(device, rows, columns, tiny=trial.paper)
            told = f"left out ({reason})"
            if has_peer:
                told = f"{_bitsandbytes_seconds(device, rows, columns) * 1e6:.1f} us"
            print(f"nf4, {rows} x {columns}: {ours * 1e6:.1f} us, bitsandbytes {told}")
        for tokens in (64,) if trial.paper else (512, 8192):
            ours, torchs = beside_sdpa(device, tokens, tiny=trial.paper)
            print(f"attention, {tokens} keys: {ours * 1e6:.1f} us, SDPA {torchs * 1e6:.1f} us")


def _bitsandbytes_seconds(device: Any, rows: int, columns: int) -> float:
    import torch
    from bitsandbytes import functional

    from mixchat.planning.bandwidth import seconds_of

    weight = torch.randn(rows, columns, dtype=torch.bfloat16, device=device)
    x = torch.ones(1, 1, columns, dtype=torch.bfloat16, device=device)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    copies = [codes.clone() for _ in range(-(-(2**28) // codes.nbytes))]  # more than a cache holds

    def multiply() -> None:
        for each in copies:
            functional.gemv_4bit(x, each.t(), state=state)

    return median(seconds_of(multiply, device)) / len(copies)


def llama_python(trial: Trial) -> str:
    """Return a Python with llama.cpp for GPUs, which is built if there is a compiler for CUDA."""
    program = "import llama_cpp, gguf; raise SystemExit(not llama_cpp.llama_supports_gpu_offload())"
    built = trial.folder / "llama" / "bin" / "python"
    for python in (trial.llama, str(built)):
        if Path(python).exists() or shutil.which(python):
            done = subprocess.run([python, "-c", program], capture_output=True, check=False)
            if not done.returncode:
                return python
    if shutil.which("nvcc") is None:
        raise LeftOutError(
            f"{trial.llama} has no llama.cpp for GPUs, and there is no nvcc to build it: name a "
            "Python with llama-cpp-python and gguf in LLAMA_PYTHON"
        )
    print("building llama.cpp for this card", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(trial.folder / "llama")], check=True)
    command = [str(built), "-m", "pip", "install", "-q", "--no-binary=llama-cpp-python"]
    flags = "-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=native"
    subprocess.run(
        [*command, "llama-cpp-python", "gguf"],
        check=True,
        stdout=sys.stderr,
        env={**os.environ, "CMAKE_ARGS": flags},
    )
    return str(built)
