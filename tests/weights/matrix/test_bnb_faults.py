"""Descriptions and tensors of bitsandbytes with faults: each is named in one line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bnb_tensors import COLUMNS, NAME, ROWS, STATE, Tensors, described, description, quantized, read
from hypothesis import given, settings
from hypothesis import strategies as st

from mixchat.base.errors import CheckpointError

Damage = Callable[[Tensors], Any]


def say(**values: Any) -> Damage:
    """Change keys of the description."""
    return lambda tensors: tensors.update({STATE: description({**described(tensors), **values})})


def write(raw: Any) -> Damage:
    """Put something else in the description's place."""
    return lambda tensors: tensors.update({STATE: description(raw)})


def drop(part: str) -> Damage:
    return lambda tensors: tensors.pop(f"{NAME}.{part}" if part else NAME)


def put(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    name = f"{NAME}.{part}" if part else NAME
    return lambda tensors: tensors.update({name: change(tensors[name].clone())})


def poison(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([tensor.numel() - 1]), value)


def forget(key: str) -> Damage:
    def damage(tensors: Tensors) -> None:
        raw = described(tensors)
        del raw[key]
        tensors[STATE] = description(raw)

    return damage


NESTED_FAULTS: dict[str, tuple[Damage, str]] = {
    "no codes": (drop(""), "is missing"),
    "no absmax": (drop("absmax"), "absmax: the tensor is missing"),
    "no nested table": (drop("nested_quant_map"), "nested_quant_map: the tensor is missing"),
    "no description": (drop("quant_state.bitsandbytes__nf4"), "0 descriptions"),
    "two descriptions": (
        lambda t: t.update({STATE.replace("nf4", "fp4"): t[STATE]}),
        "2 descriptions",
    ),
    "an unknown type": (
        lambda t: t.update({STATE.replace("nf4", "af4"): t.pop(STATE)}),
        "0 descriptions",
    ),
    "the other type's name": (
        lambda t: t.update({STATE.replace("nf4", "fp4"): t.pop(STATE)}),
        "quant_type 'nf4'",
    ),
    "no JSON": (write(b"{"), "not a JSON object"),
    "no text": (write(b"\xff\xfe{}"), "not a JSON object"),
    "deep nesting": (write(b"[" * 4096), "not a JSON object"),
    "an overlong description": (write(b" " * 5000 + b"{}"), "at most 4096 bytes"),
    "a description in fp32": (
        put("quant_state.bitsandbytes__nf4", torch.Tensor.float),
        "at most 4096 bytes",
    ),
    "a missing key": (forget("blocksize"), "its keys are not those"),
    "an unknown key": (say(zero_point=1), "its keys are not those"),
    "a quant_type with lines": (say(quant_type="a\nb\u2028c\ud800"), r"quant_type 'a\\nb"),
    "a long quant_type": (say(quant_type="x" * 3000), r"xxx\.\.\. does not fit"),
    "another shape": (say(shape=[COLUMNS, ROWS]), r"shape \[192, 96\]"),
    "a shape of floats": (say(shape=[96.0, 192.0]), r"shape \[96.0"),
    "a huge blocksize": (say(blocksize=2**62), "blocksize 4611686018427387904"),
    "a blocksize that is a float": (say(blocksize=64.0), "blocksize 64.0"),
    "a blocksize that is true": (say(blocksize=True), "blocksize True"),
    "a wrong blocksize": (say(blocksize=128), r"absmax: .* should be torch.uint8 \[144\]"),
    "a dtype that is an attribute of torch": (say(dtype="nn"), "dtype 'nn'"),
    "a nested blocksize of zero": (say(nested_blocksize=0), "nested_blocksize 0"),
    "an unknown nested dtype": (say(nested_dtype="save"), "nested_dtype 'save'"),
    "an offset of NaN": (say(nested_offset=float("nan")), "nested_offset nan"),
    "an offset too large for fp32": (say(nested_offset=1e300), "nested_offset 1e"),
    "an offset at the end of fp32": (say(nested_offset=3.4e38), "scale that is too large"),
    "nested but for the description": (
        lambda t: t.update(
            {STATE: description({k: v for k, v in described(t).items() if "nested" not in k})}
        ),
        "does not describe the nested absmax",
    ),
    "codes cut short": (put("", lambda t: t[:-1]), "9215, 1], should be 9216 bytes"),
    "codes that are a dense matrix": (
        lambda t: t.update({NAME: torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)}),
        r"bfloat16 \[96, 192\], should be",
    ),
    "codes in int32": (put("", lambda t: t.view(-1).view(torch.int32).view(-1, 1)), "int32"),
    "a short absmax": (put("absmax", lambda t: t[1:]), r"absmax: torch.uint8 \[287\], should"),
    "a nested absmax in fp32": (put("absmax", torch.Tensor.float), "absmax: torch.float32"),
    "a table of 15": (put("quant_map", lambda t: t[1:]), r"quant_map: torch.float32 \[15\]"),
    "another table": (put("quant_map", lambda t: -t), "not the table of nf4"),
    "a nested table with NaN": (put("nested_quant_map", poison(float("nan"))), "holds NaN"),
    "a nested scale of infinity": (put("nested_absmax", poison(float("inf"))), "or infinity"),
    "nested scales whose product overflows": (
        lambda t: (
            put("nested_absmax", lambda s: s.fill_(3e38))(t),
            put("nested_quant_map", lambda s: s.fill_(3e38))(t),
        ),
        "scale that is too large",
    ),
}
PLAIN_FAULTS: dict[str, tuple[Damage, str]] = {
    "an absmax of NaN": (put("absmax", poison(float("nan"))), "absmax holds NaN"),
    "an infinite absmax": (put("absmax", poison(float("inf"))), "absmax holds NaN or infinity"),
    "an absmax that bf16 cannot hold": (put("absmax", poison(3.4028e38)), "too large"),
    # A model that has run on a CPU, saved by bitsandbytes: the scales' order is lost.
    "an absmax in bf16": (put("absmax", torch.Tensor.bfloat16), "absmax: torch.bfloat16"),
    "an absmax in bytes": (put("absmax", torch.Tensor.byte), "absmax: torch.uint8"),
    "a long absmax": (put("absmax", lambda t: torch.cat((t, t))), r"\[576\], should"),
    "nested by its description alone": (
        say(nested_blocksize=256, nested_dtype="float32", nested_offset=0.0),
        "absmax: torch.float32",
    ),
    "nested by a tensor alone": (
        lambda t: t.update({f"{NAME}.nested_absmax": torch.ones(2)}),
        "does not describe the nested absmax",
    ),
}


@pytest.mark.parametrize(
    ("nested", "damage", "message"),
    [
        *(pytest.param(True, *fault, id=key) for key, fault in NESTED_FAULTS.items()),
        *(pytest.param(False, *fault, id=key) for key, fault in PLAIN_FAULTS.items()),
    ],
)
def test_a_fault_is_one_line_that_names_the_tensor(nested, damage, message):
    tensors, _ = quantized(nested=nested)
    damage(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tensors)
    text = str(caught.value)
    assert text.startswith(NAME)
    assert len(text.splitlines()) == 1
    assert len(text) < 300
    text.encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(sorted(described(quantized()[0]))), json_values))
def test_no_description_causes_anything_but_a_checkpoint_error(changes):
    tensors, expected = quantized()
    say(**changes)(tensors)
    try:
        matrix = read(tensors)
    except CheckpointError:
        return
    if not changes.keys() & {"nested_offset", "nested_dtype"}:
        assert torch.equal(matrix.dense(torch.float32), expected)


@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_no_bytes_for_a_description_cause_anything_but_a_checkpoint_error(raw):
    tensors, _ = quantized()
    tensors[STATE] = description(raw)
    with pytest.raises(CheckpointError):
        read(tensors)
