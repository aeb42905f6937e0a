"""llama.cpp's process, played by a program that says how long it took."""

import os
import stat
import sys
from pathlib import Path

import peer_child
import pytest
from peer import Peer

from mixchat.base.errors import ResourceError
from mixchat.weights.known_models import KNOWN, KnownModel


def python_that_runs(directory: Path, program: str) -> str:
    """A "Python" that runs this program whatever it is told to run."""
    path = directory / "python"
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


ECHO = """
import sys
print("ready", flush=True)
for line in sys.stdin:
    context, counts = line.split(":")
    print(*(0.5 * int(count) + int(context) for count in counts.split()), flush=True)
"""


def test_rates_come_from_the_seconds_of_each_pass(tmp_path):
    with Peer(python_that_runs(tmp_path, ECHO), tmp_path / "model.gguf", 100) as running:
        assert running.prefill(64) == pytest.approx(2.0)
        assert running.decode(0, 10) == pytest.approx(2.0)
        assert running.decode(50, 10) == pytest.approx(1 / 50.5)


def test_a_peer_that_dies_is_named_with_its_last_words(tmp_path):
    program = "import sys; sys.exit('no such model')"
    with pytest.raises(ResourceError, match="no such model"):
        Peer(python_that_runs(tmp_path, program), tmp_path / "model.gguf", 100)


# By llama.cpp's loaders, src/models/qwen3moe.cpp and openai-moe.cpp.
WEIGHTS = {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp"}
WEIGHTS |= {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
MORE = {
    "instruct": ("llama", {"ffn_norm"}),
    "qwen3": ("qwen3moe", {"ffn_norm", "attn_q_norm", "attn_k_norm"}),
    "gpt-oss": ("gpt-oss", {"post_attention_norm", "attn_sinks"}),
}


@pytest.mark.parametrize("name", MORE)
def test_a_file_has_the_tensors_that_llama_cpp_loads(name, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    small = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 64, "head_dim": 32}
    small |= {"moe_intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = {**KNOWN[name].config, **small}
    monkeypatch.setitem(peer_child.KNOWN, name, KnownModel("org/name", config))
    peer_child.make(tmp_path / "model.gguf", 1, "Q4_0", name)
    architecture, more = MORE[name]
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.architecture"].contents() == architecture
    assert reader.fields[f"{architecture}.attention.key_length"].contents() == 32
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layer = {each.removeprefix("blk.0.") for each in tensors if each.startswith("blk.0.")}
    biased = {each for each in WEIGHTS if each != "attn_norm"} if name == "gpt-oss" else set()
    assert layer == {f"{each}.weight" for each in WEIGHTS | more} | {f"{b}.bias" for b in biased}
    experts = config.get("num_experts", config.get("num_local_experts"))
    up = tensors["blk.0.ffn_up_exps.weight"]
    assert up.shape.tolist() == [256, 64, experts]
    assert up.tensor_type.name == ("MXFP4" if name == "gpt-oss" else "Q4_0")
    weights = gguf.dequantize(up.data, up.tensor_type)
    assert 0.0003 < abs(weights).mean() < 0.001


def test_nothing_of_it_is_left_afterwards(tmp_path):
    with Peer(python_that_runs(tmp_path, ECHO), tmp_path / "model.gguf", 100) as running:
        process = running._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
