"""The description of multi-head latent attention (DeepSeek-AI, arXiv:2405.04434), absorbed.

Keys and values of all heads are made of one latent a token, which the cache holds. A head's query
goes through the head's matrix of keys, and is then compared with the latents. Their weighted sum
goes through the head's matrix of values. So no key or value is ever made, for prompts neither.

H = num_attention_heads, L = kv_lora_rank, n, r and v = qk_nope_head_dim, qk_rope_head_dim and
v_head_dim.
"""

from __future__ import annotations

from mixchat.engine.layers.model_tensors import LayerTensors
from mixchat.engine.layers.operations import (
    Attend,
    HeadProducts,
    Norm,
    Operation,
    Rotate,
    Rows,
    ScaleByPosition,
)

_NORM_EPS = 1e-6  # of the norms of latents, whatever other norms have


def latent_attention(layer: LayerTensors, x: Rows, out: Rows) -> list[Operation]:
    """Describe a layer's attention of all heads to one latent a token, from x to `out` [T, D].

    `a_proj` gives the latent of queries, or without `q_b_proj` the queries, then the token's latent
    and the r columns of its keys that rotate. Queries are all heads' n columns, then their r.
    """
    assert layer.rope is not None
    spec = layer.mixer
    config = layer.config
    norms = {role: layer.norm(norm, _NORM_EPS) for role, norm in spec.tensors.items()}
    heads = config.num_attention_heads
    latent = config.kv_lora_rank
    turning = config.qk_rope_head_dim
    size = heads * (config.qk_nope_head_dim + turning)  # of all queries

    def by_head(out: Rows, x: Rows, role: str) -> HeadProducts:
        matrix = spec.matrices[role]
        return HeadProducts(out, x, layer.model.parts(matrix, heads), matrix.name)

    first = config.q_lora_rank or size
    row = Rows.new("latents", first + latent + turning)
    queries = row[:first]
    latents = row[first : first + latent]
    keys = row[first + latent :]
    steps: list[Operation] = [layer.mix(row, x, "a_proj")]
    if config.q_lora_rank:
        normed = Rows.new("query latents", first)
        steps.append(Norm(normed, queries, norms["q_a_norm"]))
        if layer.rope.query_scales is not None:
            scaled = Rows.new("scaled query latents", first)
            steps.append(ScaleByPosition(scaled, normed, layer.rope))
            normed = scaled
        queries = Rows.new("queries", size)
        steps.append(layer.mix(queries, normed, "q_b_proj"))
    kept = heads * config.qk_nope_head_dim
    rotated = Rows.new("rotated keys", 1, turning)
    absorbed = Rows.new("absorbed", heads, latent + turning)
    attended = Rows.new("attended latents", heads, latent)
    values = Rows.new("values", heads, config.v_head_dim)
    return [
        *steps,
        Norm(latents, latents, norms["kv_a_norm"]),
        by_head(absorbed.columns(slice(0, latent)), queries[:kept].as_heads(heads), "k_b_proj"),
        Rotate(absorbed.columns(slice(latent, None)), queries[kept:].as_heads(heads), layer.rope),
        Rotate(rotated, keys.as_heads(1), layer.rope),
        Attend(attended, absorbed, rotated, latents.as_heads(1), layer.number),
        by_head(values, attended, "v_b_proj"),
        layer.mix(out, values, "o_proj"),
    ]
