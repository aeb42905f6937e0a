"""The options of quantization, and the model that they make of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixchat.base.errors import UsageError
from mixchat.base.model_config import ModelConfig
from mixchat.install.source.checkpoint_index import CheckpointIndex
from mixchat.weights.format.blueprint import HEAD, Blueprint, Quantization
from mixchat.weights.matrix.linear import TYPES, Scales, type_of_bits
from mixchat.weights.matrix.quant_type import QuantType

# The rise of perplexity by `--expert-bits`, for experts that are only rounded, and for calibrated
# ones. A download always calibrates bits without a first figure. The figures are the demo model's,
# the mean over five texts, by `tests/benchmarks/quality.py`.
DEMO_LOSS: dict[str, tuple[float | None, float]] = {
    "4": (0.173, 0.075),
    "3": (0.415, 0.197),
    "2.5": (None, 0.583),
    "2.3": (None, 0.713),
    "2": (None, 1.051),
}
# Attention and head get 6 bits if they take more bytes than the first number, and more than this
# part of the bytes of a token's experts. The part is 0.25 to 0.3 in Mixtral, and 0.89 or more in
# models of small experts. Small models, like the demo with 57 MB, lose much by rounding.
_SMALL_DENSE_BYTES = 10**8
_LARGE_DENSE_PART = 0.5


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of quantization. `quant_type` is the experts' type.

    attention, head: the bits of their weights, 16, 8, 6 or 4. None is `default_dense_bits`, or
    16 if the experts are not quantized.
    """

    quant_type: QuantType = "nf4"
    attention: int | None = None
    head: int | None = None
    scales: Scales = "search"


def default_dense_bits(config: ModelConfig) -> int:
    """Return the bits of attention and head in a download of this model, 6 or 8.

    Large models of small experts get 6.
    """
    model = Blueprint(config, Quantization(attention="int8", head="int8"))
    size = sum(matrix.nbytes for matrix in model.shared_matrices.values())
    experts = config.num_moe_layers * config.num_experts_per_tok * model.expert.stride
    return 6 if size > max(_SMALL_DENSE_BYTES, _LARGE_DENSE_PART * experts) else 8


def make_blueprint(index: CheckpointIndex, options: QuantizeOptions) -> Blueprint:
    """Return the blueprint of the model that these options make of this checkpoint.

    Matrices that are quantized stay so. Raises `UsageError` for other bits.
    """
    checkpoint_type = index.experts_quant_type
    quant_type = experts_type(index.where, checkpoint_type, options.quant_type)
    shape = Blueprint(index.config, Quantization())
    layers = map(shape.dense_matrices, range(index.config.num_hidden_layers))
    attention = [f"{spec.name}.weight" for layer in layers for spec in layer]

    def type_of(part: str, names: list[str], bits: int | None) -> QuantType:
        sources = [source.name for name in names for source in index.slices(name)]
        if (
            checkpoint_type
            and TYPES[checkpoint_type].for_dense_parts
            and all(index.quant_type(source) == checkpoint_type for source in sources)
        ):
            if bits not in (None, TYPES[checkpoint_type].bits):
                raise _has_4_bits(index.where, part, checkpoint_type)
            return checkpoint_type
        if bits is None:
            bits = 16 if options.quant_type == "none" else default_dense_bits(index.config)
        return type_of_bits(bits)

    # The type holds all weights exactly. If they have several types, it is bf16.
    dtype = torch.bfloat16
    if quant_type == "none" and index.dtype == torch.float32:
        dtype = torch.float32
    elif quant_type == "none" and index.dtypes == {torch.float16}:
        dtype = torch.float16
    quantization = Quantization(
        quant_type=quant_type,
        attention=type_of("attention", attention, options.attention),
        head=type_of("head", [f"{HEAD}.weight"], options.head),
        dtype=dtype,
        scales="given" if checkpoint_type or quant_type == "none" else options.scales,
    )
    return Blueprint(index.config, quantization)


def experts_type(where: str, checkpoint_type: QuantType | None, wanted: QuantType) -> QuantType:
    """Return the experts' type: the checkpoint's if it has 4 bits, else the wanted one.

    Raises `UsageError`, which begins with `where`, for other bits.
    """
    if checkpoint_type and TYPES[checkpoint_type].bits != TYPES[wanted].bits:
        raise _has_4_bits(where, "experts", checkpoint_type)
    return checkpoint_type or wanted


def default_blueprint(
    config: ModelConfig, quant_type: QuantType = "nf4", dense_bits: int | None = None
) -> Blueprint:
    """Return the blueprint of the model that a download makes by default.

    The checkpoint is in 16 bits, or has experts in MXFP4.
    """
    dense = type_of_bits(dense_bits or default_dense_bits(config))
    scales: Scales = "given" if quant_type == "mxfp4" else QuantizeOptions.scales
    return Blueprint(config, Quantization(quant_type, dense, dense, scales=scales))


def _has_4_bits(where: str, part: str, quant_type: QuantType) -> UsageError:
    return UsageError(
        f"{where}: the checkpoint has the {part} in 4 bits already ({quant_type})",
        hint="Other bits would round the weights twice: leave them out, or download a checkpoint "
        "that is not quantized.",
    )


def rounded_from(index: CheckpointIndex, blueprint: Blueprint) -> str | None:
    """Return the checkpoint's type ("fp16", "fp32") if it is rounded to bf16."""
    if blueprint.quantization.dtype != torch.bfloat16 or index.dtypes <= {torch.bfloat16}:
        return None
    return "fp32" if torch.float32 in index.dtypes else "fp16"
