"""The steps of tests/gpu.sh: what a real GPU shows in its first hour.

    python tests/tools/gpu_steps.py [STEP...] [--paper] [--report FILE]

Each step is a process of its own, so that a fault of the GPU harms no later one. It prints its
figures, and fails with an error. The report has each line as soon as it is printed, and FILE.log
has all output. The exit status is 1 if a step failed. --paper computes on a GPU on paper
(paper_gpu.py) with tiny shapes: it shows that the steps themselves work, and its speeds mean
nothing. With steps named, the models that they write stay for the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from gpu_card_steps import (
    answers,
    card,
    contexts,
    latency,
    llama_python,
    logits,
    long,
    others,
    sanitizer,
)
from gpu_report import run_all
from gpu_trial import (
    GB,
    LEFT_OUT,
    ROOT,
    SECONDS,
    TESTS,
    TOOLS,
    LeftOutError,
    Step,
    Trial,
    device_flags,
    model_of,
    random_model,
    run_bench,
    run_mixchat,
    run_pytest,
    tiny_config,
)

SIZES_GB = (8, 12, 24)

# Tests of the suite, on the card


def kernels(trial: Trial) -> None:
    files = [f"--ignore={TESTS}/kernels/gpu/test_gpu_assembly.py", f"{TESTS}/kernels/gpu"]
    if trial.paper:
        run_pytest(*files, "-k", "nf4 or norm or route", MIXCHAT_TEST_GPU="cpu")
        return
    # Nearly all of the time is the compiler's.
    processes = min(6, os.cpu_count() or 1)
    run_pytest(*files, f"-n{processes}", "--dist=load", MIXCHAT_TEST_GPU="cuda")


def engines(trial: Trial) -> None:
    chosen = ["-k", "compute_what and (nf4 or disk)"] if trial.paper else []
    run_pytest(f"{TESTS}/loading/test_gpus.py", *chosen, **_on_cards(trial, "0"))


def several(trial: Trial) -> None:
    from mixchat.base import gpu

    if not trial.paper and gpu.count() < 2:
        raise LeftOutError("torch sees one GPU")
    run_pytest(f"{TESTS}/loading/test_gpus.py", "-k", "two", **_on_cards(trial, "0,1"))
    if trial.paper:
        return
    for shape in trial.shapes:
        model = model_of(trial, shape)
        print(model.told)
        if not run_bench(trial, model, f"{gpu.count()} GPUs", None, "cuda"):
            raise SystemExit("a bench failed")


def _on_cards(trial: Trial, numbers: str) -> dict[str, str]:
    if trial.paper:
        return {}
    return {"MIXCHAT_TEST_GPU": "cuda", "CUDA_VISIBLE_DEVICES": numbers}


# One token, and the kernels alone


def trace(trial: Trial) -> None:
    import gpu_trace

    folder = None if trial.paper else trial.report.parent
    over = [row for row in gpu_trace.rows(folder) if row.is_over]
    if over:
        raise SystemExit(f"over the budget: {'; '.join(row.name for row in over)}")


def bandwidth(trial: Trial) -> None:
    import gpu_bandwidth

    if failures := gpu_bandwidth.print_rates(trial.device, tiny=trial.paper):
        print(*failures, sep="\n", file=sys.stderr)
        raise SystemExit(f"{len(failures)} kernels failed")


# Copies over the bus


def copies(trial: Trial) -> None:
    """Print the bandwidth of experts' way to the card, and of one locked tensor."""
    from unittest.mock import Mock

    import torch

    from mixchat.base import gpu
    from mixchat.experts.cache import ExpertKey
    from mixchat.experts.load_queue import ExpertLoad
    from mixchat.experts.vram import Uploader
    from mixchat.planning.bandwidth import bus_bandwidth, seconds_of

    device = trial.device
    plain = bus_bandwidth(device)
    print(f"one page-locked tensor: {plain / GB:.1f} GB/s")
    size = 2**22 if trial.paper else 2**28
    block = torch.randint(0, 256, (size,), dtype=torch.uint8)
    slot = torch.zeros_like(block, device=device)

    def read(key: ExpertKey, stage: torch.Tensor, start: int) -> None:
        raise AssertionError("nothing comes from the disk")

    uploader = Uploader(device, read, Mock(borrow=lambda load: block))

    def upload() -> None:
        load = ExpertLoad(ExpertKey(0, 0))
        uploader.queue.begin(load, uploader.job(load, lambda: slot, block.nbytes))
        load.wait()

    rate = block.nbytes / median(seconds_of(upload, device))
    gpu.synchronize(device)
    print(f"through the stages of experts: {rate / GB:.1f} GB/s ({rate / plain:.0%})")
    if not torch.equal(slot.cpu(), block):
        raise SystemExit("the bytes that arrived are others")


# Little memory


def memory(trial: Trial) -> None:
    """Answer with less and less free VRAM, and start with too little."""

    from mixchat.base import gpu
    from mixchat.base.options import LoadOptions, SamplingOptions
    from mixchat.loading.loader import load_engine

    wide = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 16}
    tokens, unit = (48, 2**13) if trial.paper else (4000, 2**23)
    config = tiny_config() | ({} if trial.paper else wide | {"head_dim": 64})
    directory = random_model(trial, "little-memory", config)
    engine = load_engine(
        directory,
        LoadOptions(device=str(trial.device), context_size=tokens + 64, speculation=False),
    )
    passes: list[int] = []
    usual = engine.passes.model.forward

    def noting(ids: Any, *arguments: Any, **options: Any) -> Any:
        passes.append(len(ids))
        return usual(ids, *arguments, **options)

    engine.passes.model.forward = noting
    prompt = [5 + number % 80 for number in range(tokens)]

    def answer() -> list[int]:
        engine.forget()
        passes.clear()
        sampling = SamplingOptions(temperature=0)
        return list(engine.generate(prompt, sampling=sampling, stop_ids=set(), max_tokens=8))

    def told(name: str) -> None:
        print(f"{name}: passes of {passes[:4]} tokens, experts {dict(engine.slots_by_tier)}")

    expected, repeated = answer(), 0
    told("with all memory")
    computed = sum(passes)
    for count in (8, 2) if trial.paper else (64, 32, 16, 8):
        gpu.release_unused(trial.device)
        leave = count * unit
        blockers = _taken_but(leave, unit, trial.device)
        ids = answer()
        del blockers
        result = "the same tokens" if ids == expected else "other tokens"
        told(f"with {leave / 2**20:.2f} MiB free, {result}")
        repeated += sum(passes) - computed
        if ids != expected:
            raise SystemExit(f"other tokens: {ids}, not {expected}")
    if not repeated:
        raise SystemExit("memory never was so short that a pass had to shrink")
    if answer() != expected:
        raise SystemExit("other tokens when all memory is free again")
    engine.close()
    done = run_mixchat(trial, "bench", directory, *device_flags(trial), "--device-memory", "64KB")
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    print(f"with --device-memory 64KB: exit {done.returncode}: {' / '.join(lines)[:300]}")
    errors = [line for line in lines if line.startswith("error:")]
    if not done.returncode or len(errors) != 1 or "Traceback" in done.stderr:
        raise SystemExit("too little memory is not told in one line")


def _taken_but(leave: int, least: int, device: Any) -> list[Any]:
    """Take a GPU's memory but for so many bytes, in pieces down to `least` bytes.

    The driver's free bytes are no tensor's: torch rounds segments, and keeps parts of some.
    """
    import torch

    from mixchat.base import gpu

    left = torch.empty(leave, dtype=torch.uint8, device=device)
    size = 1 << gpu.free_memory(device).bit_length()
    pieces = []
    while size >= least:
        try:
            pieces.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            size //= 2
    del left
    return pieces


# Speeds


def speeds(trial: Trial) -> None:
    """Print measured speeds, and those of the plan, with all and some experts in VRAM."""
    failed = False
    for shape in trial.shapes:
        start = time.perf_counter()
        model = model_of(trial, shape)
        print(f"{model.told}: there after {time.perf_counter() - start:.0f} s")
        # A part of the layers gets the same part of the memory.
        parts = {size: f"{size * 1000 * model.share:.0f}MB" for size in SIZES_GB}
        if trial.paper:
            parts = {8: "1MB"}
        failed |= not run_bench(trial, model, "resident", None)
        for size, part in parts.items():
            name = f"{part}, as {size} GB for all layers"
            failed |= not run_bench(trial, model, name, part)
    if failed:
        raise SystemExit("a bench failed")


# llama.cpp


def llama(trial: Trial) -> None:
    """Print mixchat's and llama.cpp's speeds, measured by turns, all in VRAM."""
    from peer import write_model

    if trial.paper:
        raise LeftOutError("llama.cpp needs a real card")
    python = llama_python(trial)
    for shape in trial.shapes:
        model = model_of(trial, shape)
        gguf = trial.folder / f"{model.directory.name}.gguf"
        if not gguf.exists():
            write_model(python, gguf, model.layers, "Q4_0", shape)
        command = [sys.executable, str(TESTS / "benchmarks" / "side_by_side.py")]
        command += [str(model.directory), "--gguf", str(gguf), "--python", python]
        command += ["--gpu-layers", "-1", "--device", str(trial.device)]
        command += ["--rounds", "3", "--turns", "1", "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        tasks = json.loads(done.stdout)["tasks"]
        print(f"{model.told}:", ", ".join(map(_beside, tasks)))


def _beside(task: dict[str, Any]) -> str:
    ours, theirs = median(task["mixchat"]), median(task["llama.cpp"])
    return f"{task['name']} {ours:.1f} tok/s, llama.cpp {theirs:.1f} ({task['to_peer']:.2f} times)"


STEPS = (
    Step("card", "torch and Triton see the card, and a graph with a copy is replayed", 120, card),
    Step("latency", "a kernel, a launch and a wait take what the plan assumes", 120, latency),
    Step("kernels", "each kernel computes with each type what the CPU computes", 420, kernels),
    Step("sanitizer", "kernels touch no memory but their own, and do not race", 420, sanitizer),
    Step("engines", "tiny models of all families and types give the CPU's logits", 300, engines),
    Step("logits", "layers of real shapes give the CPU's logits, in graphs or not", 240, logits),
    Step("trace", "a token takes the launches and waits of the budget", 120, trace),
    Step("bandwidth", "each kernel reads weights near the card's memory bandwidth", 240, bandwidth),
    Step("others", "bitsandbytes' product and torch's attention are not faster", 120, others),
    Step("copies", "experts come over the bus as fast as it carries", 60, copies),
    Step("memory", "an answer ends with the same tokens if VRAM runs out", 120, memory),
    Step("speeds", "decoding and prompts are as fast as the plan says", 480, speeds),
    Step("contexts", "tokens after long contexts are as fast as the plan says", 240, contexts),
    Step("answers", "four answers at once take little longer than one", 120, answers),
    Step("long", "an answer of 2,000 tokens keeps its speed and its memory", 120, long),
    Step("llama", "llama.cpp with all layers on the GPU is not faster", 900, llama),
    Step("several", "several GPUs compute what one computes", 240, several),
)


# The processes of steps


def _run_step(step: Step, trial: Trial) -> None:
    """Run a step in this process."""
    sys.path[:0] = [str(TOOLS), str(TESTS / "loading"), str(TESTS / "benchmarks")]
    sys.stdout.reconfigure(line_buffering=True)
    with _paper_gpus() if trial.paper else contextlib.nullcontext():
        from mixchat.base import gpu

        if not gpu.count():
            raise SystemExit("torch sees no GPU; --paper runs the steps without one")
        try:
            step.run(trial)
        except LeftOutError as error:
            print(error)
            raise SystemExit(LEFT_OUT) from None


def _paper_gpus() -> Any:
    import paper_gpu

    return paper_gpu.in_place_of_cuda()


def _run_mixchat(arguments: Sequence[str]) -> None:
    """Run mixchat's command line with GPUs on paper."""
    sys.path[:0] = [str(TOOLS)]
    sys.argv = ["mixchat", *arguments]
    with _paper_gpus():
        from mixchat.cli.app import run

        run()


def main() -> int:
    if sys.argv[1:2] == ["--mixchat"]:
        _run_mixchat(sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(names)}")
    parser.add_argument("--paper", action="store_true", help="compute on a GPU on paper")
    parser.add_argument("--report", type=Path, default=ROOT / "build" / "gpu.txt", metavar="FILE")
    parser.add_argument(
        "--models",
        type=Path,
        default=ROOT / "build",
        metavar="FOLDER",
        help="folder for the models that are written",
    )
    parser.add_argument(
        "--gigabytes", type=float, default=8, metavar="N", help="of a model, at most (8)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="N", help="of all steps, at most (3600)"
    )
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [name for name in options.steps if name not in names]:
        parser.error(f"no step {unknown[0]!r}: they are {', '.join(names)}")
    chosen = [step for step in STEPS if not options.steps or step.name in options.steps]
    llama_python = os.environ.get("LLAMA_PYTHON", sys.executable)
    trial = Trial(
        options.paper,
        options.models.resolve() / "gpu-models",
        options.gigabytes,
        llama_python,
        options.report.resolve(),
    )
    if options.alone:
        _run_step(chosen[0], trial)
        return 0
    for folder in (trial.folder, trial.report.parent):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ["MIXCHAT_HOME"] = str(trial.folder / "home")
    if options.paper:
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    own = [sys.executable, str(TOOLS / "gpu_steps.py"), "--alone", f"--report={trial.report}"]
    own += [f"--models={options.models}", f"--gigabytes={options.gigabytes}"]
    own += ["--paper"] if options.paper else []
    try:
        return run_all(chosen, trial.report, lambda step: [*own, step.name], options.seconds)
    finally:
        if not options.steps:
            shutil.rmtree(trial.folder, ignore_errors=True)


if __name__ == "__main__":
    raise SystemExit(main())
