"""Tools for all campaigns: a directory, a checkpoint, forked children, tables."""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "tools"), str(HERE.parent.parent)]
REPO = "org/tiny-mixtral"
KEY = "org--tiny-mixtral"
WORKSPACE = f"home/models/.{KEY}.mixchat.unfinished"
SMALL = {"vocab_size": 32000, "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4}
TINY = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CONFIG = {
    "model_type": "mixtral",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}


@contextlib.contextmanager
def workplace(**more: str) -> Iterator[Path]:
    """Create a directory for everything, set the environment to it, and remove it at the end."""
    work = Path(tempfile.mkdtemp(prefix="mixchat-campaign-"))
    os.environ.update(
        HF_HOME=str(work / "hf"),
        MIXCHAT_HOME=str(work / "home"),
        NO_PROXY="*",
        PYTHONPATH=str(HERE.parent.parent),
        **more,
    )
    os.environ.pop("HF_HUB_OFFLINE", None)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """Mount a disk of so many bytes there, which takes root, and unmount it at the end."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "mixchat-campaign", str(place)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def warm_up() -> None:
    """Import once all that children need. Nothing here may start a thread."""
    import torch

    torch.set_num_threads(1)

    import gguf  # noqa: F401


def make_checkpoint(
    directory: Path, seed: int = 0, shard: int = 2_500_000, dtype: Any = None, **shape: int
) -> Path:
    """Write a random Mixtral whose shards split experts; in the last layers w1 is far from w3."""
    import mistral_common
    import torch
    from safetensors.torch import save_file

    from mixchat.install.source.checkpoint_index import expected_shapes
    from mixchat.weights.families.read_config import read_config

    directory.mkdir(parents=True)
    config = CONFIG | shape
    (directory / "config.json").write_text(json.dumps(config))
    source = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"
    shutil.copy(source, directory / "tokenizer.model")
    shapes = expected_shapes(read_config(config))

    def place(name: str) -> tuple[int, str]:
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else -1
        far = layer >= config["num_hidden_layers"] // 2 and "experts" in name
        return layer, parts[-2] + name if far else "a" + name

    generator = torch.Generator().manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name in sorted(shapes, key=place):
        if sum(t.nbytes for t in shards[-1].values()) > shard:
            shards.append({})
        shards[-1][name] = torch.randn(shapes[name], generator=generator).to(
            dtype or torch.bfloat16
        )
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)
    return directory


def make_source(directory: Path, seed: int, *, gguf: int) -> Path:
    """Write a checkpoint of `SMALL`'s shape in shards, or with `gguf` the same in parts of Q8_0."""
    if not gguf:
        return make_checkpoint(directory, seed, **SMALL)
    import gguf_files

    with tempfile.TemporaryDirectory() as whole:
        checkpoint = make_checkpoint(Path(whole) / "checkpoint", seed, **SMALL)
        gguf_files.write(checkpoint, directory / "tiny-Q8_0.gguf", "Q8_0", parts=7)
    return directory


def fork(work: Callable[[], object], output: Path | None = None) -> int:
    """Run `work` in a child that exits as `mixchat` would, its output in a file; return its id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.setsid()
        fd = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        code = int(work() or 0)  # type: ignore[call-overload]
    except SystemExit as ending:
        code = int(ending.code or 0)
    except Exception as error:
        from mixchat.cli.output.messages import MixchatError, print_error

        if not isinstance(error, MixchatError):
            os.environ["MIXCHAT_DEBUG"] = "1"
        code = print_error(error)
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def mixchat(*arguments: str) -> Callable[[], object]:
    """Return the command line as work for `fork`."""
    from mixchat.cli.app import run

    return lambda: run(arguments)


def wait(
    pid: int, seconds: float = 120.0, meanwhile: Callable[[], object] = lambda: None
) -> int | None:
    """Return the exit code, negative for a signal; None for a child that had to be killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        meanwhile()
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below, by its path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def parsed(text: str | None, **counts: int) -> argparse.Namespace:
    """Parse a campaign's flags, each of which is a number with this default."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, count in counts.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=count)
    return parser.parse_args()


def told(faults: Sequence[str]) -> int:
    """Print what was found, and return the exit code."""
    for fault in faults[:20]:
        print("FAULT:", fault)
    print(f"{len(faults)} faults", flush=True)
    return int(bool(faults))


def table(title: str, rows: dict[str, object]) -> None:
    """Print a table of results."""
    print(f"\n{title}")
    for name, value in rows.items():
        print(f"  {name:<58} {value}")
