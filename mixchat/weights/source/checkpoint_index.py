"""The index of a Hugging Face checkpoint, with the shard and shape of each tensor.

Only safetensors files are opened. Pickle files (`.bin`, `.pt`) can run code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import Header, TensorSpec
from mixchat.weights.format.blueprint import EMBEDDING, layer_prefix
from mixchat.weights.matrix import bnb_format
from mixchat.weights.matrix.nf4 import FourBit, Quantized4bit

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
COMPANION_FILES = (
    CONFIG,
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Buffers that old versions of transformers saved with the weights.
_IGNORED = ("rotary_emb.inv_freq",)

Read = Callable[[str], torch.Tensor]


class CheckpointIndex:
    """The tensors of a `MixtralForCausalLM`, by the headers of its shards.

    `weight_map` is None for a checkpoint of one file. `where` names the checkpoint in messages.
    Raises `CheckpointError` unless all tensors are there, with the config's shapes, and no others.
    """

    def __init__(
        self,
        config: ModelConfig,
        headers: Mapping[str, Header],
        weight_map: Mapping[str, str] | None,
        where: str,
    ) -> None:
        self.config, self.where = config, where
        self._headers = dict(headers)
        if weight_map is None:
            (file,) = headers
            weight_map = {spec.name: file for spec in headers[file].specs}
        self._weight_map = dict(weight_map)
        self._shapes = expected_shapes(config)
        self._check_tensors()

    @property
    def shards(self) -> list[str]:
        return sorted(self._headers)

    @property
    def size(self) -> int:
        return sum(header.size for header in self._headers.values())

    def header(self, shard: str) -> Header:
        return self._headers[shard]

    def shard_of(self, tensor: str) -> str:
        return self._weight_map[tensor]

    def nbytes(self, tensors: Iterable[str]) -> int:
        return sum(self._headers[self._weight_map[name]].spec(name).nbytes for name in tensors)

    def components(self, matrix: str) -> tuple[str, ...]:
        """Return the tensors of a matrix, several if bitsandbytes quantized it."""
        return bnb_format.component_names(matrix, self._weight_map)

    def quant_type(self, matrix: str) -> FourBit | None:
        """Return the type to which bitsandbytes quantized a matrix, or None."""
        return bnb_format.quant_type(matrix, self._weight_map)

    @property
    def dtype(self) -> torch.dtype:
        """Return the embedding's type, which stands for the checkpoint's."""
        return self._headers[self._weight_map[EMBEDDING]].spec(EMBEDDING).dtype

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Return the types of all tensors that are not quantized."""
        dense = (name for name in self._shapes if self.quant_type(name) is None)
        return {self._headers[self._weight_map[name]].spec(name).dtype for name in dense}

    def read_dense(self, matrix: str, read: Read) -> torch.Tensor:
        """Read a matrix or vector as floats. Raises `CheckpointError` for NaN or infinity."""
        if self.quant_type(matrix) is None:
            tensor = read(matrix)
        else:
            tensor = self.read_4bit(matrix, read).dense(torch.bfloat16)
        least, most = tensor.aminmax()  # NaN wins; isfinite() would need a second tensor
        if not (torch.isfinite(least) and torch.isfinite(most)):
            kind = "NaN" if torch.isnan(least) else "infinity"
            raise CheckpointError(f"{self._place(matrix)}: {matrix} holds {kind}")
        return tensor.view(self._shapes[matrix])

    def read_4bit(self, matrix: str, read: Read) -> Quantized4bit:
        """Read a matrix that bitsandbytes quantized. Raises `CheckpointError`."""
        rows, columns = self._shapes[matrix]
        return bnb_format.read_matrix(matrix, read, self._weight_map, rows=rows, columns=columns)

    def _place(self, tensor: str) -> str:
        return self._headers[self._weight_map[tensor]].where

    def _check_tensors(self) -> None:
        known: set[str] = set()
        for name, shape in self._shapes.items():
            if name not in self._weight_map:
                raise CheckpointError(f"{self.where}: the tensor {name} is missing")
            if self.quant_type(name) is None:
                self._check_dense(name, shape)
            elif len(shape) != 2:
                raise CheckpointError(f"{self._place(name)}: {name} is quantized, but no matrix")
            known.update(self.components(name))
        for name, shard in self._weight_map.items():
            self._headers[shard].spec(name)
            tied_head = self.config.tie_word_embeddings and name == "lm_head.weight"
            if name not in known and not tied_head and not name.endswith(_IGNORED):
                raise CheckpointError(f"{self.where}: {name!r:.120} is not a tensor of a Mixtral")

    def _check_dense(self, name: str, shape: tuple[int, ...]) -> None:
        spec = self._headers[self._weight_map[name]].spec(name)
        if spec.shape != shape:
            raise CheckpointError(
                f"{self._place(name)}: {name} has the shape {list(spec.shape)}, "
                f"config.json asks for {list(shape)}"
            )
        if spec.dtype not in _FLOATS:
            raise CheckpointError(
                f"{self._place(name)}: {name} is {spec.dtype}: "
                "only bf16, fp16 and fp32 weights can be quantized"
            )


def expert_tensor(layer: int, expert: int, matrix: str) -> str:
    """Return the name of `w1`, `w2` or `w3` of an expert."""
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"


def attention_tensors(layer: int) -> tuple[str, ...]:
    """Return the names of a layer's four attention matrices."""
    return tuple(f"model.layers.{layer}.self_attn.{name}_proj.weight" for name in "qkvo")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a Mixtral checkpoint, by name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = layer_prefix(layer)
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


def expected_index(
    config: ModelConfig, where: str, shard_bytes: float = math.inf
) -> CheckpointIndex:
    """Return the index of a bf16 checkpoint without reading it."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for name, shape in expected_shapes(config).items():
        spec = TensorSpec(name, torch.bfloat16, shape)
        if size + spec.nbytes > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    names = [f"{where}-{number:05}" for number in range(len(shards))] if shards[1:] else [where]
    headers = {name: Header.of(specs, name) for name, specs in zip(names, shards, strict=True)}
    weight_map = {spec.name: name for name in names for spec in headers[name].specs}
    return CheckpointIndex(config, headers, weight_map, where)


def read_weight_map(
    names: Collection[str], index: bytes | None, *, where: str
) -> dict[str, str] | None:
    """Return the shard of each tensor of a checkpoint, or None if it has no index.

    `index` is the content of the index. Raises `CheckpointError` if nothing can be read.
    """
    if index is not None:
        weight_map = _parse(index, where)
        if missing := sorted(set(weight_map.values()) - set(names)):
            raise CheckpointError(
                f"{where}: {INDEX} names {missing[0]}, which is not there"
                + (f" ({len(missing)} files are missing)" if len(missing) > 1 else "")
            )
        return weight_map
    if SINGLE in names:
        return None
    if any(name.endswith(_PICKLES) for name in names):
        raise CheckpointError(
            f"{where}: there are only pickled weights, which mixchat never opens",
            hint="A pickle can run any program when it is read. Use a checkpoint in safetensors.",
        )
    raise CheckpointError(
        f"{where}: there are no weights (neither {INDEX} nor {SINGLE})",
        hint="mixchat reads checkpoints in Hugging Face's layout.",
    )


def shard_files(weight_map: dict[str, str] | None) -> list[str]:
    """Return the names of the files with weights."""
    return [SINGLE] if weight_map is None else sorted(set(weight_map.values()))


def _parse(index: bytes, where: str) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(index)["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{where}: {INDEX} cannot be read") from None
    for shard in weight_map.values():
        if (
            not isinstance(shard, str)
            or not _PLAIN_NAME.fullmatch(shard)
            or not shard.endswith(".safetensors")
            or shard.startswith("consolidated")
        ):
            raise CheckpointError(f"{where}: {INDEX} names a file that is no shard: {shard!r:.80}")
    if not weight_map:
        raise CheckpointError(f"{where}: {INDEX} names no files")
    return weight_map
