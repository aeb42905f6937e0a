from dataclasses import replace

import torch

from mixchat.bench.rounds import bytes_per_token, operations_per_token
from mixchat.install.known_models import KNOWN
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization

CONFIG = read_config({**KNOWN["instruct"].config, "num_hidden_layers": 4})


def test_the_bytes_of_a_token_are_those_of_the_matrices_it_meets():
    """Mixtral's expert takes 93.6 MB in NF4, attention of a layer 41.9 million weights."""
    dense = Blueprint(CONFIG, Quantization())
    attention, head = 4096 * (4096 + 1024 + 1024) + 4096 * 4096, 32000 * 4096
    assert bytes_per_token(dense, 0, None) == 4 * (2 * 93_585_408 + 2 * attention) + 2 * head
    packed = Blueprint(CONFIG, Quantization(attention="nf4", head="nf4"))
    four_bit = (attention * 4 + head) // 2 + (attention * 4 + head) // 64 * 2
    assert bytes_per_token(packed, 0, None) == 4 * 2 * 93_585_408 + four_bit


def test_a_context_adds_its_keys_and_values():
    """128 KiB a token with 32 layers."""
    blueprint = Blueprint(CONFIG, Quantization())
    empty = bytes_per_token(blueprint, 0, None)
    assert bytes_per_token(blueprint, 1000, None) - empty == 1000 * 131_072 // 8
    eight = bytes_per_token(blueprint, 1000, 8) - empty
    assert 0.5 < eight / (1000 * 131_072 // 8) < 0.52


def test_a_tied_head_is_read_too():
    tied = Blueprint(replace(CONFIG, tie_word_embeddings=True), Quantization())
    assert bytes_per_token(tied, 0, None) == bytes_per_token(
        Blueprint(CONFIG, Quantization()), 0, None
    )


def test_operations_are_two_for_each_weight_but_the_heads():
    blueprint = Blueprint(CONFIG, Quantization(attention="int8", dtype=torch.bfloat16))
    experts, attention = 2 * 3 * 4096 * 14336, 4096 * (4096 + 2048 + 4096)
    assert operations_per_token(blueprint) == 2 * 4 * (experts + attention)
