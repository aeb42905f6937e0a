"""llama.cpp's process, played by a program that says how long it took."""

import ctypes
import os
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peer_child
import pytest
from peer import Peer

from mixchat.base.errors import ResourceError
from mixchat.install.known_models import KNOWN, KnownModel


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

# It answers with its last argument but one.
GPU_LAYERS = """
import sys
print("ready", flush=True)
for line in sys.stdin:
    print(sys.argv[-2], flush=True)
"""


def test_rates_come_from_the_seconds_of_each_pass(tmp_path):
    with Peer(python_that_runs(tmp_path, ECHO), tmp_path / "model.gguf", 100) as running:
        assert running.prefill(64) == pytest.approx(2.0)
        assert running.decode(0, 10) == pytest.approx(2.0)
        assert running.decode(50, 10) == pytest.approx(1 / 50.5)


def test_llama_cpp_is_told_how_many_layers_a_gpu_computes(tmp_path):
    """It was not, and computed on the CPU beside mixchat on a GPU."""
    python = python_that_runs(tmp_path, GPU_LAYERS)
    with Peer(python, tmp_path / "model.gguf", 100, gpu_layers=16) as running:
        assert running.prefill(64) == 64 / 16


class LlamaCpp:
    """llama.cpp's memory, in which the positions of each sequence have to follow each other."""

    llama_token = ctypes.c_int

    def __init__(self):
        self.lengths = dict.fromkeys(range(peer_child.SEQUENCES), 0)
        self.logits = ctypes.c_float()
        self.copies = self.computed = 0

    def llama_get_memory(self, context):
        return None

    def llama_memory_seq_rm(self, memory, sequence, first, last):
        self.lengths[sequence] = min(self.lengths[sequence], first)
        return True

    def llama_memory_clear(self, memory, data):
        self.lengths = dict.fromkeys(self.lengths, 0)
        self.copies = 0

    def llama_memory_seq_cp(self, memory, source, target, first, last):
        self.lengths[target] = self.lengths[source]
        self.copies += 1

    def llama_state_seq_get_size(self, context, sequence):
        return 2

    def llama_state_seq_get_data(self, context, state, size, sequence):
        state[:] = self.lengths[sequence].to_bytes(2, "little")

    def llama_state_seq_set_data(self, context, state, size, sequence):
        self.lengths[sequence] = int.from_bytes(bytes(state), "little")
        return size

    def llama_batch_init(self, tokens, embeddings, sequences):
        rows = [[0] for _ in range(tokens)]
        names = ("token", "pos", "logits", "n_seq_id")
        return SimpleNamespace(seq_id=rows, **{name: [0] * tokens for name in names})

    def llama_batch_get_one(self, ids, count):
        self.computed += count
        first = range(self.lengths[0], self.lengths[0] + count)
        return SimpleNamespace(n_tokens=count, pos=first, seq_id=[[0]] * count)

    def llama_decode(self, context, batch):
        for n in range(batch.n_tokens):
            (sequence,) = batch.seq_id[n]
            if batch.pos[n] != self.lengths[sequence]:
                return -1
            self.lengths[sequence] += 1
        return 0

    def llama_synchronize(self, context):
        pass

    def llama_get_logits(self, context):
        return ctypes.addressof(self.logits)

    def llama_batch_free(self, batch):
        pass


def scripted_model(monkeypatch):
    monkeypatch.setattr(peer_child.Llama, "__init__", lambda self: None)
    model = peer_child.Llama()
    model._llama, model._context, model._held, model._states = LlamaCpp(), None, 0, {}
    model._random = np.random.default_rng(1)
    return model


def test_a_long_context_is_computed_once_and_copied(monkeypatch):
    """Computing 32,768 tokens took llama.cpp seven minutes before each turn."""
    model = scripted_model(monkeypatch)
    for _ in range(2):
        for _ in range(2):  # the second time the tokens after it are cut off
            model.begin(1000)
            assert (model._llama.copies, model._llama.lengths[0]) == (2, 500)
            model.run(3)
        model.begin(4)
        assert (model._llama.copies, model._llama.lengths[0]) == (0, 4)
    assert model._llama.computed == 500 + 4 * 3 + 2 * 4


def test_measurements_follow_each_other_in_any_order(monkeypatch):
    """Other sequences kept their tokens, so that llama.cpp refused the second round."""
    model = scripted_model(monkeypatch)
    llama = model._llama
    for sequences in (4, 1, 2, 4):
        model.begin(0)
        for position in range(3):
            model.run_together(sequences, position)
        assert list(llama.lengths.values())[:5] == [3] * sequences + [0] * (5 - sequences)
    model.begin(8)
    assert llama.lengths == dict.fromkeys(llama.lengths, 0) | {0: 8}


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
    known = KnownModel("org/name", "a name")
    vars(known)["config"] = config
    monkeypatch.setitem(peer_child.KNOWN, name, known)
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
