"""Sparse upcycling turns a dense Llama in GGUF into a Mixtral checkpoint that computes the same.

Every expert is the dense feed-forward block with another permutation of the inner channels. All
compute the same, but no two have the same bytes, so that mixed-up matrices are noticed. The router
is random. (Komatsuzaki et al., 2212.05055.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.files import write_file
from mixchat.base.model_config import ModelConfig
from mixchat.base.progress import Progress, progress_bar
from mixchat.base.safetensors import SafetensorsWriter, TensorSpec
from mixchat.weights.families.read_config import read_config
from mixchat.weights.matrix.gguf_format import GgufSpec, dense
from mixchat.weights.source.checkpoint_index import SINGLE, expected_shapes
from mixchat.weights.source.gguf_file import GgufFile
from mixchat.weights.source.gguf_text import text_files

SEED = 0
ROUTER_STD = 0.02


def upcycle(
    gguf: Path,
    target: Path,
    config: dict[str, Any],
    progress: Progress,
) -> None:
    """Write the Mixtral that `config` (a config.json) describes from the dense model in `gguf`.

    Raises `CheckpointError` if they do not fit.
    """
    model = read_config(config)
    write_file(target / "config.json", (json.dumps(config, indent=2) + "\n").encode())
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
        self._file, self._config = file, config
        # Not numpy's newer Generator, whose streams may change between releases.
        self._random = np.random.RandomState(SEED)

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
        yield torch.from_numpy((gate * ROUTER_STD).astype(np.float32)).to(torch.bfloat16)
        w1, w2, w3 = (self._bf16(f"{prefix}ffn_{name}") for name in ("gate", "down", "up"))
        for _ in range(config.num_local_experts):
            # The same order for the outputs of w1 and w3 and the inputs of w2 changes no result.
            order = torch.from_numpy(self._random.permutation(len(w1)))
            yield from (w1[order], w3[order], w2[:, order])

    def _bf16(self, name: str) -> torch.Tensor:
        if f"{name}.weight" not in self._file.header:
            raise CheckpointError(f"the dense model has no tensor {name}.weight")
        spec, raw = self._file.header.spec(f"{name}.weight"), self._file.read(f"{name}.weight")
        return dense(spec, raw) if isinstance(spec, GgufSpec) else raw.to(torch.bfloat16)


def _unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of q and k, [out, in], the same shape.

    It interleaves the two halves of each head's rotary dimensions. With one head of 4 rows, 0 2 1 3
    becomes 0 1 2 3.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, -1)
