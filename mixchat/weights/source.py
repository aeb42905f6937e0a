"""A checkpoint as Hugging Face keeps it: finds its tensors, checks them, reads them one by one.

Only safetensors files are opened. Pickle files (`.bin`, `.pt`) can run code and are never touched.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mixchat.config import ModelConfig
from mixchat.errors import CheckpointError
from mixchat.weights.checkpoint_files import INDEX, read_weight_map, weight_files
from mixchat.weights.safetensors import SafetensorsFile

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Buffers that old versions of transformers saved beside the weights.
_IGNORED = ("rotary_emb.inv_freq",)


class SourceCheckpoint:
    """The weights of a `MixtralForCausalLM` in a directory.

    Opening reads every shard's header and checks that all tensors are there, with the shapes of
    config.json, and no others. Raises `CheckpointError` with one line that names the first fault.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = ModelConfig.from_file(directory / "config.json")
        self._files: dict[str, SafetensorsFile] = {}
        self._where: dict[str, SafetensorsFile] = {}
        try:
            self._open_shards()
            self._check_tensors()
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be read."""
        return sum(self._where[name].spec(name).nbytes for name in expected_shapes(self.config))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the embedding, which stands for the whole."""
        name = "model.embed_tokens.weight"
        return self._where[name].spec(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU. Raises `CheckpointError` where it holds NaN or infinity."""
        tensor = self._where[name].read(name)
        least, most = tensor.aminmax()  # NaN wins; unlike isfinite() it needs no second tensor
        if not (torch.isfinite(least) and torch.isfinite(most)):
            kind = "NaN" if torch.isnan(least) else "infinity"
            raise CheckpointError(f"{self._where[name].path}: {name} holds {kind}")
        return tensor

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()

    def _open_shards(self) -> None:
        where = str(self.directory)
        try:
            names = os.listdir(self.directory)
            index = (self.directory / INDEX).read_bytes() if INDEX in names else None
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be read ({error.strerror})") from None
        for name in weight_files(names, index, where=where):
            self._files[name] = SafetensorsFile(self.directory / name)
        if index is None:
            (file,) = self._files.values()
            self._where = {spec.name: file for spec in file.specs}
            return
        for tensor, name in read_weight_map(index, where=where).items():
            self._files[name].spec(tensor)
            self._where[tensor] = self._files[name]

    def _check_tensors(self) -> None:
        expected = expected_shapes(self.config)
        for name, shape in expected.items():
            if name not in self._where:
                raise CheckpointError(f"{self.directory}: the tensor {name} is missing")
            spec = self._where[name].spec(name)
            if spec.shape != shape:
                raise CheckpointError(
                    f"{self._where[name].path}: {name} has the shape {list(spec.shape)}, "
                    f"config.json asks for {list(shape)}"
                )
            if spec.dtype not in _FLOATS:
                raise CheckpointError(
                    f"{self._where[name].path}: {name} is {spec.dtype}: "
                    "only bf16, fp16 and fp32 weights can be quantized"
                )
        for name in self._where:
            tied_head = self.config.tie_word_embeddings and name == "lm_head.weight"
            if name not in expected and not tied_head and not name.endswith(_IGNORED):
                raise CheckpointError(f"{self.directory}: {name} is not a tensor of a Mixtral")


def expert_tensor(layer: int, expert: int, matrix: str) -> str:
    """Name of `w1`, `w2` or `w3` of an expert."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Mixtral checkpoint, by name, with its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "self_attn.q_proj.weight"] = (heads, hidden)
        shapes[prefix + "self_attn.k_proj.weight"] = (kv * config.head_dim, hidden)
        shapes[prefix + "self_attn.v_proj.weight"] = (kv * config.head_dim, hidden)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, heads)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "block_sparse_moe.gate.weight"] = (config.num_local_experts, hidden)
        for expert in range(config.num_local_experts):
            shapes[expert_tensor(layer, expert, "w1")] = (inner, hidden)
            shapes[expert_tensor(layer, expert, "w2")] = (hidden, inner)
            shapes[expert_tensor(layer, expert, "w3")] = (inner, hidden)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes
