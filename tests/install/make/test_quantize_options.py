"""From a checkpoint to an installed model: 4-bit codes that are copied, checkpoints refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_tools import files_of, quantize, shard

from mixchat.base.errors import CheckpointError
from mixchat.base.safetensors import TensorSpec, header_bytes
from mixchat.install.make.download_plan import find_memory_need
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.install.source.checkpoint_index import expected_shapes
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import MANIFEST_COPY, MANIFEST_FILE, Source, read_manifest

HALF_OF_MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def change(checkpoint: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def test_the_manifest_says_where_it_came_from_and_what_was_done(tiny_checkpoint, tmp_path):
    quantize(tiny_checkpoint, tmp_path / "model")
    manifest = read_manifest(tmp_path / "model")
    assert manifest.source == Source("org/repo", "c0ffee")
    assert manifest.quantization["quant_type"] == "nf4"
    names = set(manifest.files) | set(manifest.weights) | {MANIFEST_FILE, MANIFEST_COPY}
    assert names == set(files_of(tmp_path / "model"))
    assert InstalledModel(tmp_path / "model").config.hidden_size == 64


@pytest.mark.parametrize(
    ("embedding", "others", "installed"),
    [
        (torch.float16, torch.float16, torch.float16),
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.float16, torch.float32, torch.bfloat16),  # which may not fit into fp16
        (torch.float32, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_none_keeps_the_type_that_holds_all_weights(
    tiny_checkpoint, tmp_path, embedding, others, installed
):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(embedding if "embed" in name else others)
    save_file(tensors, checkpoint / "model.safetensors")
    index = DirectoryCheckpoint(checkpoint, Source("x")).index
    assert make_blueprint(index, QuantizeOptions("none")).quantization.dtype == installed
    assert make_blueprint(index, QuantizeOptions()).quantization.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
            "only bf16, fp16 and fp32",
        ),
        (
            lambda t: t["model.layers.0.block_sparse_moe.experts.1.w2.weight"][3].fill_(
                float("nan")
            ),
            r"layers\.0.*experts\.1\.w2\.weight holds NaN",
        ),
        (lambda t: t["lm_head.weight"][0].fill_(float("-inf")), "lm_head.weight holds infinity"),
    ],
)
def test_a_checkpoint_that_is_wrong_is_refused_and_not_trusted_later(
    checkpoint, tmp_path, edit, message
):
    change(checkpoint, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        quantize(checkpoint, tmp_path / "model")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="not a finished model"):
        InstalledModel(tmp_path / "model")


def test_buffers_of_old_transformers_are_ignored(checkpoint, tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(checkpoint, lambda tensors: tensors.update({name: torch.ones(8)}))
    quantize(checkpoint, tmp_path / "model")
    assert InstalledModel(tmp_path / "model").config.num_hidden_layers == 2


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", "", "x\0.safetensors",
     "x.safetensors\n", "..", "..safetensors", "C:x.safetensors", "a\\b.safetensors", None, 3],
)  # fmt: skip
def test_an_index_that_leaves_the_directory_is_refused(checkpoint, name):
    index = {"weight_map": {"lm_head.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="names a file that is no shard"):
        DirectoryCheckpoint(checkpoint, Source("x"))


@pytest.mark.parametrize(
    "text", ["[]", "[" * 10**5, '{"weight_map": 3}', '{"weight_map": {"a": []}}']
)
def test_an_index_that_is_none_is_refused(checkpoint, text):
    (checkpoint / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        DirectoryCheckpoint(checkpoint, Source("x"))


def test_a_missing_shard_is_named(tiny_checkpoint, tmp_path):
    checkpoint = shard(tiny_checkpoint, tmp_path / "shards", 3)
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-00002-of-00003\.safetensors, which"):
        DirectoryCheckpoint(checkpoint, Source("x"))


def test_a_checkpoint_that_changed_is_told_by_its_fingerprint(checkpoint):
    before = DirectoryCheckpoint(checkpoint, Source("x")).fingerprint
    assert DirectoryCheckpoint(checkpoint, Source("x")).fingerprint == before
    change(checkpoint, lambda tensors: tensors["lm_head.weight"].add_(1))
    assert DirectoryCheckpoint(checkpoint, Source("x")).fingerprint != before


PEAK = """
import sys
from pathlib import Path
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.weights.format.manifest import Source
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
opened = DirectoryCheckpoint(Path(sys.argv[1]), Source("x"))
CheckpointBuild(opened, Path(sys.argv[2]), make_blueprint(opened.index, QuantizeOptions())).run()
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def peak_memory(checkpoint: Path, target: Path) -> int:
    """Bytes that quantizing in a process of its own takes at most."""
    out = subprocess.run(
        [sys.executable, "-c", PEAK, str(checkpoint), str(target)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(out.stdout) * 1024


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_count_of_layers(make_checkpoint, tmp_path):
    """Eight layers more, 200 MB, or 27 MB in codes, may not cost more than three experts.

    On a slow disk, one or two more are in flight.
    """
    shape = {"hidden_size": 512, "intermediate_size": 1024}
    peaks = [
        peak_memory(make_checkpoint(**shape, num_hidden_layers=layers), tmp_path / str(layers))
        for layers in (2, 10)
    ]
    assert peaks[1] - peaks[0] < 3 * 3 * 512 * 1024 * 4


@pytest.mark.slow
def test_peak_memory_at_half_of_mixtrals_width_in_fp32_is_below_900_mb(tmp_path):
    """The embedding has 262 MB, of which less than 2.5 may be there at once, beside a process.

    One layer with two experts takes as many bytes at once as 32 with 8.
    """
    config = {**HALF_OF_MIXTRAL, "num_hidden_layers": 1, "num_local_experts": 2}
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(read_config(config))
    specs = [TensorSpec(name, torch.float32, shape) for name, shape in shapes.items()]
    with open(checkpoint / "model.safetensors", "wb") as file:
        # Zeros that are never written: up to 1 GB, which a disk takes seconds for.
        start = file.write(header_bytes(specs))
        file.truncate(start + sum(spec.nbytes for spec in specs))
    index = DirectoryCheckpoint(checkpoint, Source("x")).index
    need = find_memory_need(index, make_blueprint(index, QuantizeOptions()))
    peak = peak_memory(checkpoint, tmp_path / "model")
    assert peak < 0.9e9
    assert peak < need.needed
