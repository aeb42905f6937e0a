"""Sparse upcycling turns a dense Llama in GGUF into a Mixtral checkpoint that computes the same.

Every expert is the dense feed-forward block with another permutation of the inner channels. All
compute the same, but no two have the same bytes, so that mixed-up matrices are noticed. The router
is random. (Komatsuzaki et al., 2212.05055.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.files import write_file
from mixchat.base.model_config import ModelConfig
from mixchat.base.progress import Progress, progress_bar
from mixchat.base.safetensors import SafetensorsWriter, TensorSpec
from mixchat.weights.families.read_config import read_config
from mixchat.weights.source.checkpoint_index import SINGLE, expected_shapes

SEED = 0
ROUTER_STD = 0.02
_CONTROL = 3  # gguf.TokenType.CONTROL
Floats = npt.NDArray[np.float32]


def upcycle(
    gguf: Path,
    target: Path,
    config: dict[str, Any],
    progress: Progress,
) -> None:
    """Write the Mixtral that `config` (a config.json) describes from the dense model in `gguf`.

    Raises `CheckpointError` if they do not fit.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    shape = read_config(config)
    write_tokenizer(
        {key: field.contents() for key, field in reader.fields.items()},
        target,
        context=shape.max_position_embeddings,
    )
    write_file(target / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    dense = _Dense({tensor.name: tensor for tensor in reader.tensors}, shape)
    _write_weights(target / SINGLE, shape, dense.sparse_tensors(), progress)


class _Dense:
    def __init__(self, tensors: dict[str, Any], config: ModelConfig) -> None:
        self._tensors, self._config = tensors, config
        # Not numpy's newer Generator, whose streams may change between releases.
        self._random = np.random.RandomState(SEED)

    def sparse_tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor of the Mixtral, in bf16, in the order of `expected_shapes`."""
        yield self._bf16("token_embd")
        for layer in range(self._config.num_hidden_layers):
            yield from self._layer(f"blk.{layer}.")
        yield self._bf16("output_norm")
        yield self._bf16("output" if "output.weight" in self._tensors else "token_embd")

    def _layer(self, dense: str) -> Iterator[torch.Tensor]:
        config = self._config
        yield self._bf16(f"{dense}attn_norm")
        yield self._bf16(f"{dense}ffn_norm")
        yield _to_bf16(_unpermute(self._read(f"{dense}attn_q"), config.num_attention_heads))
        yield _to_bf16(_unpermute(self._read(f"{dense}attn_k"), config.num_key_value_heads))
        yield self._bf16(f"{dense}attn_v")
        yield self._bf16(f"{dense}attn_output")
        gate = self._random.standard_normal((config.num_local_experts, config.hidden_size))
        yield _to_bf16((gate * ROUTER_STD).astype(np.float32))
        w1, w2, w3 = (self._bf16(f"{dense}ffn_{name}") for name in ("gate", "down", "up"))
        for _ in range(config.num_local_experts):
            order = torch.from_numpy(self._random.permutation(len(w1)))
            yield from (w1[order], w3[order], w2[:, order])

    def _bf16(self, name: str) -> torch.Tensor:
        return _to_bf16(self._read(name))

    def _read(self, name: str) -> Floats:
        from gguf import dequantize

        try:
            tensor = self._tensors[f"{name}.weight"]
        except KeyError:
            raise CheckpointError(f"the dense model has no tensor {name}.weight") from None
        values: Floats = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"the dense model's {name}.weight is not finite")
        return values


def _unpermute(weight: Floats, heads: int) -> Floats:
    """Undo llama.cpp's order of the rows of q and k, [out, in], the same shape.

    It interleaves the two halves of each head's rotary dimensions. With one head of 4 rows, 0 2 1 3
    becomes 0 1 2 3.
    """
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, -1)


def _to_bf16(values: Floats) -> torch.Tensor:
    # torch would warn of a read-only view of the mapped file.
    owned = values if values.flags.writeable else values.copy()
    return torch.from_numpy(owned).to(torch.bfloat16)


def _write_weights(
    path: Path,
    config: ModelConfig,
    tensors: Iterator[torch.Tensor],
    progress: Progress,
) -> None:
    specs = [
        TensorSpec(name, torch.bfloat16, shape) for name, shape in expected_shapes(config).items()
    ]
    total = sum(spec.nbytes for spec in specs)
    with (
        progress_bar(progress, "building the demo model", total) as task,
        SafetensorsWriter(path, specs) as writer,
    ):
        for spec, tensor in zip(specs, tensors, strict=True):
            _check(spec, tensor)
            writer.write(spec.name, tensor)
            task.advance(spec.nbytes)


def _check(spec: TensorSpec, tensor: torch.Tensor) -> None:
    if spec.shape != tuple(tensor.shape):
        raise CheckpointError(
            f"the dense model gives {spec.name} {list(tensor.shape)} where "
            f"{list(spec.shape)} is expected"
        )


def write_tokenizer(metadata: Mapping[str, Any], target: Path, *, context: int) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) into `target`.

    `metadata` has the GGUF file's keys, `context` is in tokens. Raises `CheckpointError` on any
    other tokenizer than the demo model's.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(f"the GGUF file's tokenizer {kind} is not known")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    if len(set(tokens)) != len(tokens):
        raise CheckpointError("the GGUF file's vocabulary holds a token twice")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)
    )
    # Each digit stands by itself, then comes GPT-2's pattern.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ == _CONTROL
        ]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    path = target / "tokenizer_config.json"
    write_file(path, (json.dumps(config, indent=2) + "\n").encode())
