"""The tensors of an installed model by file, with their names, types and shapes.

`shared.safetensors` has all that every token needs. Each layer with experts has one
`experts-LLL.safetensors`. These layers are counted from 0, without dense layers before them.
Some matrices are fused, because one large multiplication is faster. `qkv_proj` is q above k above
v, and an expert's `w13` is w1 (gate) above w3 (up). w2 is the down projection, out = w2(silu(w1 x)
* w3 x), or another product of w1 x and w3 x. A bias of a matrix comes after it, fp32. If a matrix's
shape does not fit its type, the matrix is dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import Header, TensorSpec
from mixchat.weights.format.expert import ExpertSpec, swiglu_of
from mixchat.weights.matrix.linear import TYPES, LinearSpec, Scales
from mixchat.weights.matrix.quant_type import QuantType

SHARED_FILE = "shared.safetensors"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head"
_ROUTER = "block_sparse_moe.gate"

# The types of w1 and w3 of an expert, and of w2, as `Quantization` has them.
Form = tuple[QuantType, QuantType | None]


def experts_file(layer: int) -> str:
    """Return the name of the file with a layer's experts."""
    return f"experts-{layer:03d}.safetensors"


@dataclass(frozen=True)
class Quantization:
    """The types of the matrices. `dtype` is the type of all other tensors.

    The experts are of `quant_type`, but w2 is of type `down` if that is given. Attention and head
    are "int8", "int6", "int5", "none" (dense, in `dtype`), or in 4 bits. A layer's other dense
    parts have the type of attention. `scales` says how scales in 4 bits are chosen. If those of
    experts are calibrated, those of attention and head are searched, or calibrated if their type
    allows it.
    """

    quant_type: QuantType = "nf4"
    attention: QuantType = "none"
    head: QuantType = "none"
    dtype: torch.dtype = torch.bfloat16
    scales: Scales = "search"
    down: QuantType | None = None

    def description(self) -> dict[str, Any]:
        dtype = str(self.dtype).removeprefix("torch.")
        values = {**asdict(self), "blocksize": TYPES[self.quant_type].blocksize, "dtype": dtype}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> Quantization:
        """Read a manifest's description."""
        values = {key: value for key, value in description.items() if key != "blocksize"}
        return cls(**{**values, "dtype": getattr(torch, values["dtype"])})


@dataclass(frozen=True)
class Blueprint:
    """The tensors of a model of this shape and quantization, and how they are computed.

    layers: the quantization of each layer's experts, empty if all have `quantization`. In such a
    mix the experts of layers differ in size.
    """

    config: ModelConfig
    quantization: Quantization
    layers: tuple[Quantization, ...] = ()

    def quantizations(self) -> dict[str, Quantization]:
        layers = self.layers or (self.quantization,) * self.config.num_moe_layers
        experts = {experts_file(layer): own for layer, own in enumerate(layers)}
        return {SHARED_FILE: self.quantization} | experts

    def description(self) -> dict[str, Any]:
        """Return the manifest's `quantization`, with the scales of the experts."""
        scales = self.layers[0].scales if self.layers else self.quantization.scales
        return replace(self.quantization, scales=scales).description()

    def descriptions(self) -> dict[str, dict[str, Any]]:
        """Return by file the values in which it differs from `description`."""
        whole = self.description()
        own = {name: form.description() for name, form in self.quantizations().items()}
        return {
            name: {key: value for key, value in values.items() if value != whole.get(key)}
            for name, values in own.items()
        }

    def expert_of(self, layer: int) -> ExpertSpec:
        return self._layer_experts[layer] if self.layers else self.expert

    @cached_property
    def expert(self) -> ExpertSpec:
        """Return the largest expert."""
        forms = dict.fromkeys(self.layers) or [self.quantization]
        return max(map(self._expert, forms), key=lambda expert: expert.stride)

    @cached_property
    def _layer_experts(self) -> tuple[ExpertSpec, ...]:
        experts = {form: self._expert(form) for form in set(self.layers)}
        return tuple(experts[form] for form in self.layers)

    def _expert(self, form: Quantization) -> ExpertSpec:
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        up, scales, bias = form.quant_type, form.scales, self.config.moe_bias
        down, own = form.down or up, Blueprint(self.config, form)
        return ExpertSpec(
            replace(own._linear("w13", 2 * inner, hidden, up, 2), scales=scales, bias=bias),
            replace(own._linear("w2", hidden, inner, down), scales=scales, bias=bias),
            swiglu_of(self.config),
        )

    @property
    def expert_forms(self) -> list[ExpertSpec]:
        """Return the distinct forms of the layers' experts."""
        return [*dict.fromkeys(self._layer_experts)] or [self.expert]

    @cached_property
    def experts_size(self) -> int:
        """Return the bytes of all experts in memory."""
        layers = range(self.config.num_moe_layers)
        return self.config.num_local_experts * sum(self.expert_of(n).stride for n in layers)

    @property
    def mean_expert(self) -> int:
        """Return the bytes of an expert, averaged over all layers."""
        return self.experts_size // self.expert_count

    def qkv(self, layer: int) -> LinearSpec:
        """Return the fused q, k and v projection of a layer."""
        config = self.config
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        name = f"{layer_prefix(layer)}self_attn.qkv_proj"
        bias = config.attention_bias or config.qkv_bias
        return self._dense(name, rows, config.hidden_size, bias=bias)

    def o(self, layer: int) -> LinearSpec:
        columns = self.config.num_attention_heads * self.config.head_dim
        name = f"{layer_prefix(layer)}self_attn.o_proj"
        bias = self.config.attention_bias
        return self._dense(name, self.config.hidden_size, columns, bias=bias)

    def mlp(self, layer: int) -> tuple[LinearSpec, LinearSpec] | None:
        """Return w13 and w2 of a layer's dense part, if it has one."""
        inner, hidden = self.config.mlp_intermediate_size(layer), self.config.hidden_size
        if not inner:
            return None
        name = f"{layer_prefix(layer)}mlp"
        return (
            self._dense(f"{name}.w13", 2 * inner, hidden, parts=2),
            self._dense(f"{name}.w2", hidden, inner),
        )

    def mlp_expert(self, layer: int) -> ExpertSpec | None:
        """Return a layer's dense part as an expert that is always chosen, if it has one."""
        matrices = self.mlp(layer)
        return None if matrices is None else ExpertSpec(*matrices, swiglu_of(self.config))

    def dense_matrices(self, layer: int | None = None) -> list[LinearSpec]:
        """Return the matrices of a layer that every token passes, the last layer's if None."""
        layer = self.config.num_hidden_layers - 1 if layer is None else layer
        return [self.qkv(layer), self.o(layer), *(self.mlp(layer) or ())]

    @property
    def typical_matrices(self) -> list[LinearSpec]:
        """Return the matrices of an expert of each form, and of the first and last layer."""
        experts = [spec for form in self.expert_forms for spec in (form.gate_up, form.down)]
        return [*experts, *self.dense_matrices(0), *self.dense_matrices()]

    def expert_arithmetic(self, device: torch.device, *, exact: bool) -> str:
        """Return a name of the arithmetic of experts there. Equal names give equal bits."""
        matrices = [form.gate_up for form in self.expert_forms]
        return " and ".join(sorted({m.arithmetic(device, exact=exact) for m in matrices}))

    @property
    def head(self) -> LinearSpec | None:
        """Return the output head, or None if it is the embedding (tied, not quantized)."""
        config = self.config
        head = self._linear(HEAD, config.vocab_size, config.hidden_size, self.quantization.head)
        return None if config.head_is_embedding and head.quant_type == "none" else head

    @cached_property
    def shared_matrices(self) -> dict[str, LinearSpec]:
        """Return the matrices of attention, dense parts and head by their names."""
        layers = range(self.config.num_hidden_layers)
        specs = [spec for layer in layers for spec in self.dense_matrices(layer)]
        return {spec.name: spec for spec in (*specs, self.head) if spec is not None}

    def norms(self, layer: int) -> tuple[TensorSpec, TensorSpec]:
        """Return the weights of a layer's norms before attention and experts."""
        hidden = self.config.hidden_size
        return (
            self._tensor(layer, "input_layernorm.weight", hidden),
            self._tensor(layer, "post_attention_layernorm.weight", hidden),
        )

    def qk_norms(self, layer: int) -> list[TensorSpec]:
        """Return the weights of the norms of queries and keys, if the model has them."""
        config, heads = self.config, {"q": 1, "k": 1}
        if config.qk_norm is None:
            return []
        if config.qk_norm == "projection":
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
        return [
            self._tensor(layer, f"self_attn.{x}_norm.weight", count * config.head_dim)
            for x, count in heads.items()
        ]

    def sinks(self, layer: int) -> TensorSpec:
        """Return a logit for each head of a layer, which joins the sum of the head's softmax."""
        return self._tensor(layer, "self_attn.sinks", self.config.num_attention_heads)

    def gate(self, layer: int) -> TensorSpec:
        """Return the matrix of a layer's router, which is never quantized."""
        # It is small, 64 KB in Mixtral, and an error in it chooses other experts.
        shape = self.config.num_local_experts, self.config.hidden_size
        return self._tensor(layer, f"{_ROUTER}.weight", *shape)

    def gate_bias(self, layer: int) -> TensorSpec:
        """Return the bias of a layer's router, which only models with `moe_bias` have."""
        return self._tensor(layer, f"{_ROUTER}.bias", self.config.num_local_experts)

    def score_correction(self, layer: int) -> TensorSpec:
        """Return the correction that a layer's router adds to scores, fp32."""
        # transformers keeps it in fp32 in models in bf16, too.
        name, count = f"{_ROUTER}.e_score_correction_bias", self.config.num_local_experts
        return replace(self._tensor(layer, name, count), dtype=torch.float32)

    def mlp_gate(self, layer: int) -> TensorSpec:
        """Return the gate of a layer's dense part, which only some models have."""
        return self._tensor(layer, "mlp.gate.weight", 1, self.config.hidden_size)

    def router(self, layer: int) -> Iterator[TensorSpec]:
        """Yield the tensors that route a layer's tokens to experts, and weigh its dense part."""
        yield self.gate(layer)
        if self.config.moe_bias:
            yield self.gate_bias(layer)
        if self.config.e_score_correction_bias:
            yield self.score_correction(layer)
        if self.config.shared_expert_gate:
            yield self.mlp_gate(layer)

    @property
    def embedding(self) -> TensorSpec:
        shape = (self.config.vocab_size, self.config.hidden_size)
        return TensorSpec(EMBEDDING, self.quantization.dtype, shape)

    @property
    def norm(self) -> TensorSpec:
        return TensorSpec(NORM, self.quantization.dtype, (self.config.hidden_size,))

    def shared_tensors(self) -> Iterator[TensorSpec]:
        """Yield the tensors of `shared.safetensors`, in their order."""
        yield self.embedding
        for layer in range(self.config.num_hidden_layers):
            yield from self.norms(layer)
            yield from self.qkv(layer).tensors
            yield from self.o(layer).tensors
            yield from self.qk_norms(layer)
            if self.config.attention_sinks:
                yield self.sinks(layer)
            if layer >= self.config.first_k_dense_replace:
                yield from self.router(layer)
            for matrix in self.mlp(layer) or ():
                yield from matrix.tensors
        yield self.norm
        if self.head is not None:
            yield from self.head.tensors

    def expert_tensors(self, layer: int) -> Iterator[TensorSpec]:
        """Yield the tensors of a layer's experts, in their order."""
        for expert in range(self.config.num_local_experts):
            yield from self.expert_of(layer).tensors(expert)

    def files(self) -> dict[str, list[TensorSpec]]:
        """Return the files of weights by name, with their tensors in order."""
        layers = range(self.config.num_moe_layers)
        return {SHARED_FILE: list(self.shared_tensors())} | {
            experts_file(layer): list(self.expert_tensors(layer)) for layer in layers
        }

    def headers(self) -> dict[str, Header]:
        return {name: Header.of(specs, name) for name, specs in self.files().items()}

    @property
    def size(self) -> int:
        return sum(header.size for header in self.headers().values())

    @property
    def weights_size(self) -> int:
        """Return the bytes of all tensors, which is the size without the files' headers."""
        return sum(spec.nbytes for spec in self.shared_tensors()) + self.experts_size

    @property
    def parameter_count(self) -> int:
        """Return the number of weights, whatever their types. A tied head counts once."""
        dense = Blueprint(self.config, Quantization("none"))
        experts = (*dense.expert.gate_up.tensors, *dense.expert.down.tensors)
        is_tied = self.config.tie_word_embeddings
        shared = (spec for spec in dense.shared_tensors() if not (is_tied and HEAD in spec.name))
        count = sum(prod(spec.shape) for spec in shared)
        return count + self.expert_count * sum(prod(spec.shape) for spec in experts)

    @property
    def attention_size(self) -> int:
        """Return the bytes of the matrices of a layer's attention and dense part."""
        return sum(spec.nbytes for matrix in self.dense_matrices() for spec in matrix.tensors)

    @property
    def shared_size(self) -> int:
        """Return the bytes of the shared tensors that are held in memory."""
        # The embedding is held only if it is the head, too, since a token needs one row of it.
        size = sum(spec.nbytes for spec in self.shared_tensors())
        return size if self.head is None else size - self.embedding.nbytes

    @property
    def expert_count(self) -> int:
        return self.config.num_moe_layers * self.config.num_local_experts

    def _tensor(self, layer: int, name: str, *shape: int) -> TensorSpec:
        return TensorSpec(f"{layer_prefix(layer)}{name}", self.quantization.dtype, shape)

    def _dense(
        self, name: str, rows: int, columns: int, *, bias: bool = False, parts: int = 1
    ) -> LinearSpec:
        matrix = self._linear(name, rows, columns, self.quantization.attention, parts)
        return replace(matrix, bias=bias)

    def _linear(
        self, name: str, rows: int, columns: int, quant_type: QuantType, parts: int = 1
    ) -> LinearSpec:
        """Return a matrix of this type, or a dense one if its shape does not fit the type.

        parts: how many matrices lie one above the other and are used apart. Each has to be of whole
        bands. Of a single one, rows of zeros fill up the last band.
        """
        stored, scales = self.quantization, self.quantization.scales
        if not TYPES[quant_type].fits(columns, rows // parts if parts > 1 else 0):
            quant_type = "none"
        if scales == "calibrated" and not TYPES[quant_type].calibrated_dense_parts:
            scales = "search"
        return LinearSpec(name, rows, columns, quant_type, stored.dtype, scales)


def layers_unlike(shared: Quantization, layers: Iterable[Quantization]) -> tuple[Quantization, ...]:
    """Return a blueprint's `layers`, empty if all are equal to `shared`."""
    own = tuple(layers)
    return () if {*own} <= {shared} else own


def layer_prefix(layer: int) -> str:
    """Return the prefix of the names of a layer's tensors."""
    return f"model.layers.{layer}."
