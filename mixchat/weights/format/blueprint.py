"""The tensors of an installed model by file, with their names, types and shapes.

`shared.safetensors` has all tensors that every token needs. Each layer with experts has one
`experts-LLL.safetensors`. These layers are counted from 0, without dense layers before them. Some
matrices are fused, because one large multiplication is faster. An expert's `w13` is w1 (gate) above
w3 (up). w2 is the down projection, out = w2(silu(w1 x) * w3 x), or another product of w1 x and w3
x. A bias of a matrix comes after it, fp32. If a matrix's shape does not fit its type, the matrix is
dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Any

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import Header, TensorSpec
from mixchat.weights.format.expert import ExpertSpec, swiglu_of
from mixchat.weights.format.mixers import MIXERS, LayerSpecs, MixerSpec
from mixchat.weights.matrix.linear import TYPES, LinearSpec, Scales
from mixchat.weights.matrix.quant_type import QuantType

SHARED_FILE = "shared.safetensors"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head"
_ROUTER = "block_sparse_moe.gate"

# The type of an expert's w1 and w3, and the type of w2, None if it is the same.
Form = tuple[QuantType, QuantType | None]


def experts_file(layer: int) -> str:
    """Return the name of the file with a layer's experts."""
    return f"experts-{layer:03d}.safetensors"


@dataclass(frozen=True)
class Quantization:
    """The types of the matrices. `dtype` is the type of all other tensors.

    The experts are of `quant_type`, but w2 is of type `down` if that is given. Attention and head
    are "int8", "int6", "none" (dense, in `dtype`), or in 4 bits. A layer's other dense
    parts have the type of attention. `scales` says how scales in 4 bits are chosen. If the
    scales of experts are calibrated, attention and head have searched scales, or calibrated scales
    if their type allows it.
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
        """Return for each file the values in which it differs from `description`."""
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
        hidden = self.config.hidden_size
        inner = self.config.intermediate_size
        up = form.quant_type
        scales = form.scales
        bias = self.config.moe_bias
        down = form.down or up
        own = Blueprint(self.config, form)
        return ExpertSpec(
            replace(own.linear("w13", 2 * inner, hidden, up, 2), scales=scales, bias=bias),
            replace(own.linear("w2", hidden, inner, down), scales=scales, bias=bias),
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

    def mixer(self, layer: int) -> MixerSpec:
        """Return the tensors of the part of a layer that mixes tokens."""
        return MIXERS[self.config.mixer(layer)](self._layer(layer))

    def _layer(self, layer: int) -> LayerSpecs:
        stored = self.quantization
        matrix = partial(self.linear, quant_type=stored.attention)
        return LayerSpecs(self.config, layer, matrix, stored.dtype, self.norm_dtype)

    def mlp(self, layer: int) -> tuple[LinearSpec, LinearSpec] | None:
        """Return w13 and w2 of a layer's dense part, if it has one."""
        inner = self.config.mlp_intermediate_size(layer)
        hidden = self.config.hidden_size
        if not inner:
            return None
        specs = self._layer(layer)
        return (
            specs.matrix("mlp.w13", 2 * inner, hidden, parts=2),
            specs.matrix("mlp.w2", hidden, inner),
        )

    def mlp_expert(self, layer: int) -> ExpertSpec | None:
        """Return a layer's dense part as an expert that is always chosen, if it has one."""
        matrices = self.mlp(layer)
        return None if matrices is None else ExpertSpec(*matrices, swiglu_of(self.config))

    def dense_matrices(self, layer: int) -> list[LinearSpec]:
        """Return the matrices of a layer that every token passes."""
        return [*self.mixer(layer).matrices.values(), *(self.mlp(layer) or ())]

    @cached_property
    def layer_forms(self) -> dict[int, int]:
        """Return the first layer of each form, with the count of layers of this form.

        Layers of one form have mixers and dense parts of the same types and shapes. Layers with and
        without experts have different forms.
        """
        layers: dict[tuple[object, ...], list[int]] = {}
        for layer in range(self.config.num_hidden_layers):
            matrices = (replace(matrix, name="") for matrix in self.dense_matrices(layer))
            is_dense = layer < self.config.first_k_dense_replace
            form = is_dense, self.config.mixer(layer), *matrices
            layers.setdefault(form, []).append(layer)
        return {alike[0]: len(alike) for alike in layers.values()}

    @property
    def typical_matrices(self) -> list[LinearSpec]:
        """Return the matrices of an expert and of a layer, of each form."""
        experts = [spec for form in self.expert_forms for spec in (form.gate_up, form.down)]
        layers = [spec for layer in self.layer_forms for spec in self.dense_matrices(layer)]
        return [*experts, *layers]

    @property
    def norm_columns(self) -> set[int]:
        """Return the lengths of the rows that the layers' norms normalize."""
        norms = (norm for layer in self.layer_forms for norm in self.mixer(layer).norms)
        return {self.config.hidden_size, *(norm.shape[-1] for norm in norms)}

    def expert_arithmetic(self, device: torch.device, *, exact: bool) -> str:
        """Return a name of the experts' arithmetic on a device. Equal names give equal bits."""
        matrices = [form.gate_up for form in self.expert_forms]
        return " and ".join(sorted({m.arithmetic(device, exact=exact) for m in matrices}))

    @property
    def head(self) -> LinearSpec | None:
        """Return the output head, or None if it is the embedding (tied, not quantized)."""
        config = self.config
        head = self.linear(HEAD, config.vocab_size, config.hidden_size, self.quantization.head)
        return None if config.head_is_embedding and head.quant_type == "none" else head

    @cached_property
    def shared_matrices(self) -> dict[str, LinearSpec]:
        """Return the matrices of attention, dense parts and head by their names."""
        layers = range(self.config.num_hidden_layers)
        specs = [spec for layer in layers for spec in self.dense_matrices(layer)]
        return {spec.name: spec for spec in (*specs, self.head) if spec is not None}

    def norms(self, layer: int) -> tuple[TensorSpec, TensorSpec]:
        """Return the weights of a layer's norms before attention and experts."""
        specs = self._layer(layer)
        hidden = self.config.hidden_size
        return (
            specs.norm("input_layernorm.weight", hidden),
            specs.norm("post_attention_layernorm.weight", hidden),
        )

    def sandwich_norms(self, layer: int) -> dict[str, TensorSpec]:
        """Return the weights of a layer's other norms by their roles, if the model has them.

        Those named "out" are of outputs, and the others of inputs.
        """
        if not self.config.sandwich_norms:
            return {}
        specs = self._layer(layer)
        hidden = self.config.hidden_size
        names = {
            "mixer_out": "mixer_out_norm.weight",
            "mlp_out": "mlp.out_norm.weight",
            "router": "block_sparse_moe.router_norm.weight",
            "experts": "block_sparse_moe.norm.weight",
            "experts_out": "block_sparse_moe.out_norm.weight",
            "layer_out": "out_norm.weight",
        }
        return {role: specs.norm(name, hidden) for role, name in names.items()}

    def layer_scalar(self, layer: int) -> TensorSpec:
        """Return the number [1] that multiplies the output of a layer with sandwich norms."""
        return self._layer(layer).tensor("layer_scalar", 1)

    def router(self, layer: int) -> dict[str, TensorSpec]:
        """Return the tensors that route a layer's tokens, and weigh its dense part, by their roles.

        None is quantized. The gate is small, 64 KB in Mixtral, and an error in it chooses other
        experts.
        """
        specs = self._layer(layer)
        hidden = self.config.hidden_size
        experts = self.config.num_local_experts
        tensors = {"gate": specs.tensor(f"{_ROUTER}.weight", experts, hidden)}
        if self.config.moe_bias:
            tensors["bias"] = specs.tensor(f"{_ROUTER}.bias", experts)
        if self.config.e_score_correction_bias:
            # transformers keeps it in fp32, also in models in bf16.
            name = f"{_ROUTER}.e_score_correction_bias"
            tensors["correction"] = specs.tensor(name, experts, dtype=torch.float32)
        if self.config.per_expert_scale:
            tensors["expert_scales"] = specs.tensor(f"{_ROUTER}.per_expert_scale", experts)
        if self.config.shared_expert_gate:
            tensors["mlp_gate"] = specs.tensor("mlp.gate.weight", 1, hidden)
        return tensors

    @property
    def embedding(self) -> TensorSpec:
        shape = (self.config.vocab_size, self.config.hidden_size)
        return TensorSpec(EMBEDDING, self.quantization.dtype, shape)

    @property
    def norm(self) -> TensorSpec:
        return TensorSpec(NORM, self.norm_dtype, (self.config.hidden_size,))

    @property
    def norm_dtype(self) -> torch.dtype:
        """Return the type of the weights of norms."""
        return torch.float32 if self.config.fp32_norms else self.quantization.dtype

    def shared_tensors(self) -> Iterator[TensorSpec]:
        """Yield the tensors of `shared.safetensors`, in their order."""
        yield self.embedding
        for layer in range(self.config.num_hidden_layers):
            yield from self.norms(layer)
            if self.config.sandwich_norms:
                yield from self.sandwich_norms(layer).values()
                yield self.layer_scalar(layer)
            yield from self.mixer(layer).all_tensors()
            if layer >= self.config.first_k_dense_replace:
                yield from self.router(layer).values()
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
    def mean_layer(self) -> int:
        """Return the bytes of `dense_matrices`, averaged over the layers with experts."""
        first = self.config.first_k_dense_replace
        layers = {layer: count for layer, count in self.layer_forms.items() if layer >= first}
        size = sum(
            count * tensor.nbytes
            for layer, count in layers.items()
            for matrix in self.dense_matrices(layer)
            for tensor in matrix.tensors
        )
        return size // self.config.num_moe_layers

    @property
    def shared_size(self) -> int:
        """Return the bytes of the shared tensors that are held in memory."""
        # The embedding is held only if it is the head, too, since a token needs one row of it.
        size = sum(spec.nbytes for spec in self.shared_tensors())
        return size if self.head is None else size - self.embedding.nbytes

    @property
    def expert_count(self) -> int:
        return self.config.num_moe_layers * self.config.num_local_experts

    def linear(
        self, name: str, rows: int, columns: int, quant_type: QuantType, parts: int = 1
    ) -> LinearSpec:
        """Return a matrix of this type, or a dense one if its shape does not fit the type.

        parts: how many matrices lie one above the other and are used apart. Each needs whole bands.
        In a single matrix, rows of zeros fill up the last band.
        """
        stored = self.quantization
        scales = self.quantization.scales
        if not TYPES[quant_type].fits(columns, rows // parts if parts > 1 else 0):
            quant_type = "none"
        if scales == "calibrated" and not TYPES[quant_type].calibrated_dense_parts:
            scales = "search"
        return LinearSpec(name, rows, columns, quant_type, stored.dtype, scales)


def layers_unlike(shared: Quantization, layers: Iterable[Quantization]) -> tuple[Quantization, ...]:
    """Return a blueprint's `layers`, empty if all are equal to `shared`."""
    own = tuple(layers)
    return () if {*own} <= {shared} else own
