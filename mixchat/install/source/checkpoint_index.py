"""The index of a checkpoint, with the shard and shape of each tensor.

Only safetensors and GGUF files are opened. Pickle files (`.bin`, `.pt`) can run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from math import prod
from pathlib import Path

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import Header, SafetensorsFile, TensorSpec, split_part
from mixchat.install.source.gguf_file import GgufFile, GgufHeader
from mixchat.weights.families.family import (
    CheckpointForm,
    Slice,
    Tensors,
    decoder_tensors,
    expert_prefix,
    layer_prefix,
)
from mixchat.weights.families.gguf import ROUTER, gguf_tensors
from mixchat.weights.families.read_config import FAMILIES, slices
from mixchat.weights.format.blueprint import EMBEDDING
from mixchat.weights.matrix import bnb_format, fp8_format, gguf_format, mxfp4_format
from mixchat.weights.matrix.gguf_format import GgufSpec
from mixchat.weights.matrix.nf4 import Quantized4bit
from mixchat.weights.matrix.quant_type import QuantType

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle")
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Buffers that old versions of transformers saved with the weights, and layers that predict further
# tokens.
_LAYER = re.compile(r"(?:model\.layers|blk)\.(\d{1,9})\..*")
_IGNORED = re.compile(r".*rotary_emb\.inv_freq|rope_freqs\.weight|mtp\..*")

Read = Callable[[str], torch.Tensor]


class CheckpointIndex:
    """The tensors of a checkpoint, by the headers of its shards.

    `weight_map` is the shard of each tensor, taken from the headers if None. `where` names the
    checkpoint in messages. Tensors in GGUF have llama.cpp's names. Raises `CheckpointError` unless
    the checkpoint has all tensors, with the config's shapes, and no others.
    """

    def __init__(
        self,
        config: ModelConfig,
        headers: Mapping[str, Header],
        weight_map: Mapping[str, str] | None,
        where: str,
    ) -> None:
        self.config = config
        self.where = where
        self._headers = dict(headers)
        self._gguf = any(isinstance(header, GgufHeader) for header in headers.values())
        if weight_map is None:
            weight_map = {spec.name: file for file in headers for spec in headers[file].specs}
        self._weight_map = dict(weight_map)
        self._form = CheckpointForm.of(self._weight_map)
        self._shapes: dict[str, tuple[int, ...]] = {}  # of stored tensors, also whole stacks
        tensors = (
            gguf_tensors(config, self._weight_map)
            if self._gguf
            else decoder_tensors(config, FAMILIES[config.model_type], self._form)
        )
        self._slices = dict(self._checked(tensors))
        self._refuse_others()

    @property
    def shards(self) -> list[str]:
        return sorted(self._headers)

    @property
    def size(self) -> int:
        return sum(header.size for header in self._headers.values())

    def header(self, shard: str) -> Header:
        return self._headers[shard]

    def open(self, shard: str, path: Path) -> SafetensorsFile:
        """Open a shard that is in the file `path`. Raises `CheckpointError`."""
        return GgufFile(path) if self._gguf else SafetensorsFile(path)

    def shard_of(self, tensor: str) -> str:
        return self._weight_map[split_part(tensor)[0]]

    def nbytes(self, tensors: Iterable[str]) -> int:
        return sum(self._spec(name).nbytes for name in tensors)

    def memory(self, matrix: str) -> int:
        """Return the bytes that reading a matrix takes."""
        decoded = 2 * prod(self._shape(matrix)) if self._is_decoded(matrix) else 0
        return self.nbytes(self.components(matrix)) + decoded

    def slices(self, tensor: str) -> tuple[Slice, ...]:
        """Return the slices that make a tensor of the installed model, like "lm_head.weight"."""
        return self._slices[tensor]

    def components(self, matrix: str) -> tuple[str, ...]:
        """Return the tensors of a matrix, several if it is quantized."""
        if mxfp4_format.is_quantized(matrix, self._weight_map):
            return mxfp4_format.component_names(matrix)
        if fp8_format.is_quantized(matrix, self._weight_map):
            return fp8_format.component_names(matrix)
        return bnb_format.component_names(matrix, self._weight_map)

    def quant_type(self, matrix: str) -> QuantType | None:
        """Return the type whose codes a matrix has, None if it is dense or has to be decoded."""
        if mxfp4_format.is_quantized(matrix, self._weight_map):
            return "mxfp4"
        if spec := self._in_blocks(matrix):
            return "mxfp4" if spec.ggml_type == "MXFP4" else None
        return "nf4" if bnb_format.quant_type(matrix, self._weight_map) == "nf4" else None

    @property
    def experts_quant_type(self) -> QuantType | None:
        """Return the type to which the experts are quantized, or None."""
        layer = layer_prefix(self.config.first_k_dense_replace)
        return self.quant_type(self.slices(f"{expert_prefix(layer, 0)}w13.weight")[0].name)

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the embedding, which is taken for the whole checkpoint's."""
        return self._dtype(self.slices(EMBEDDING)[0].name)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Return the types of all matrices that are not quantized.

        Vectors may be in fp32 in a checkpoint in bf16. llama.cpp's converter makes routers fp32,
        too.
        """
        matrices = (name for name, shape in self._shapes.items() if len(shape) > 1)
        dense = (name for name in matrices if self.quant_type(name) is None)
        if self._gguf:
            dense = (name for name in dense if ROUTER not in name)
        return {self._dtype(name) for name in dense}

    def read_dense(self, matrix: str, read: Read) -> torch.Tensor:
        """Read a matrix or vector as floats. Raises `CheckpointError` for NaN or infinity."""
        if spec := self._in_blocks(matrix):
            tensor = gguf_format.dense(spec, read(matrix))
        elif fp8_format.is_quantized(matrix, self._weight_map):
            tensor = fp8_format.read_matrix(matrix, read)
        elif self.quant_type(matrix) is None and not self._is_decoded(matrix):
            tensor = read(matrix)
        else:
            tensor = self.read_4bit(matrix, read).dense(torch.bfloat16)
            if self.quant_type(matrix) == "mxfp4":
                # gpt-oss stores matrices as [in, out] in 16 bits, and as [out, in] in MXFP4.
                tensor = tensor.T
        # One NaN makes both NaN. isfinite() would need a second tensor of this size.
        least, most = tensor.aminmax()
        if not (torch.isfinite(least) and torch.isfinite(most)):
            value = "NaN" if torch.isnan(least) else "infinity"
            raise CheckpointError(f"{self._place(matrix)}: {matrix} holds {value}")
        return tensor.view(self._shape(matrix))

    def read_4bit(self, matrix: str, read: Read) -> Quantized4bit:
        """Read a quantized matrix. Raises `CheckpointError`."""
        if mxfp4_format.is_quantized(matrix, self._weight_map):
            return mxfp4_format.read_matrix(matrix, read)
        if spec := self._in_blocks(matrix):
            return gguf_format.mxfp4(spec, read(matrix))
        rows, columns = self._shape(matrix)
        return bnb_format.read_matrix(matrix, read, self._weight_map, rows=rows, columns=columns)

    def _place(self, tensor: str) -> str:
        return self._headers[self.shard_of(tensor)].where

    def _spec(self, tensor: str) -> TensorSpec:
        return self._headers[self.shard_of(tensor)].spec(tensor)

    def _in_blocks(self, tensor: str) -> GgufSpec | None:
        """Return the spec of a tensor in blocks of GGUF, else None."""
        spec = self._spec(tensor) if self._gguf else None
        return spec if isinstance(spec, GgufSpec) else None

    def _dtype(self, tensor: str) -> torch.dtype:
        """Return the type that a tensor is read as."""
        return torch.bfloat16 if self._is_decoded(tensor) else self._spec(tensor).dtype

    def _is_decoded(self, tensor: str) -> bool:
        """Return whether a tensor is decoded to bf16 when it is read."""
        if self._gguf:
            return self._in_blocks(tensor) is not None
        in_fp8 = fp8_format.is_quantized(tensor, self._weight_map)
        return in_fp8 or bnb_format.quant_type(tensor, self._weight_map) == "fp4"

    def _shape(self, tensor: str) -> tuple[int, ...]:
        stack, number = split_part(tensor)
        return self._shapes[stack] if number is None else self._shapes[stack][1:]

    def _checked(self, tensors: Tensors) -> Tensors:
        """Yield described tensors, after each slice was compared with the checkpoint's tensor.

        So a config.json with a billion layers fails at the first layer that is missing.
        """
        for installed, own_slices in tensors:
            for source in own_slices:
                name, _ = split_part(source.name)
                if name not in self._shapes:
                    self._check_tensor(name, source.shape)
                    self._shapes[name] = source.shape
            yield installed, own_slices

    def _refuse_others(self) -> None:
        """Refuse tensors that the config does not describe."""
        config = self.config
        known = {component for name in self._shapes for component in self.components(name)}
        if config.tie_word_embeddings:
            known.add("lm_head.weight")
        # The layers that predict further tokens follow the others.
        last = config.num_hidden_layers
        predicting = range(last, last + config.num_nextn_predict_layers)
        for name, shard in self._weight_map.items():
            self._headers[shard].spec(name)
            layer = _LAYER.fullmatch(name)
            if name in known or (layer and int(layer[1]) in predicting) or _IGNORED.fullmatch(name):
                continue
            if self._form.is_other(name):
                continue
            raise CheckpointError(
                f"{self.where}: {name!r:.120} is not a tensor of a {config.model_type}"
            )

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        """Compare a tensor, in its stored form, with the config's shape."""
        for component in self.components(name):
            if component not in self._weight_map:
                raise CheckpointError(f"{self.where}: the tensor {component} is missing")
        if mxfp4_format.is_quantized(name, self._weight_map):
            for spec in mxfp4_format.component_specs(name, shape):
                self._check_shape(spec.name, spec.shape)
                self._check_type(spec.name, (spec.dtype,), "MXFP4 has bytes")
        elif fp8_format.is_quantized(name, self._weight_map):
            numbers, scales = fp8_format.component_names(name)
            self._check_shape(numbers, shape)
            self._check_shape(scales, fp8_format.scales_shape(shape))
            self._check_type(scales, _FLOATS, "scales are floats")
            if len(shape) != 2 or self._spec(numbers).dtype != fp8_format.FP8:
                raise CheckpointError(f"{self._place(name)}: {name} is no matrix in FP8")
        elif self._gguf or bnb_format.quant_type(name, self._weight_map) is None:
            self._check_shape(name, shape)
            self._check_type(name, _FLOATS, "only bf16, fp16 and fp32 weights can be quantized")
        elif len(shape) != 2:
            raise CheckpointError(f"{self._place(name)}: {name} is quantized, but no matrix")
        elif self._spec(name).nbytes != (size := (prod(shape) + 1) // 2):
            raise CheckpointError(
                f"{self._place(name)}: {name} has {self._spec(name).nbytes} bytes of codes, "
                f"config.json asks for {size}"
            )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        spec = self._in_blocks(name)
        stored = spec.weights if spec else self._spec(name).shape
        if stored != shape:
            raise CheckpointError(
                f"{self._place(name)}: {name} has the shape {list(stored)}, "
                f"config.json asks for {list(shape)}"
            )

    def _check_type(self, name: str, allowed: Collection[torch.dtype], reason: str) -> None:
        dtype = self._dtype(name)
        if dtype not in allowed:
            raise CheckpointError(f"{self._place(name)}: {name} is {dtype}: {reason}")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a Hugging Face checkpoint, by name."""
    every = (source for own_slices in slices(config).values() for source in own_slices)
    return {split_part(source.name)[0]: source.shape for source in every}


def expected_index(config: ModelConfig, where: str, *, mxfp4: bool = False) -> CheckpointIndex:
    """Return the index of a bf16 checkpoint in one file, without reading it.

    mxfp4: stacks of matrices are in MXFP4.
    """
    specs: list[TensorSpec] = []
    for name, shape in expected_shapes(config).items():
        if mxfp4 and len(shape) > 2:
            specs += mxfp4_format.component_specs(name, shape)
        else:
            specs.append(TensorSpec(name, torch.bfloat16, shape))
    return CheckpointIndex(config, {where: Header.of(specs, where)}, None, where)


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
        # consolidated.* is Mistral's own copy of the weights, with the rows of q and k in another
        # order. The name becomes a path, so it must not leave the directory.
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
