"""Models in GGUF: installed, they are those of the Hugging Face checkpoints they were made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import pytest
import torch
from fake_hub import REPO, FakeHub
from safetensors.torch import load
from weight_tools import Meter, files_of, get

from mixchat.base.errors import CheckpointError, UsageError
from mixchat.base.progress import NoProgress
from mixchat.install.care.repair import repair, verify
from mixchat.install.make import download_plan
from mixchat.install.make.download import DownloadRequest, plan_download
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.make.unfinished import Spill
from mixchat.install.models import resolve
from mixchat.install.source.open_checkpoint import open_checkpoint
from mixchat.weights.families.gguf_config import gguf_config
from mixchat.weights.families.read_config import read_config, read_config_file
from mixchat.weights.format.blueprint import SHARED_FILE
from mixchat.weights.format.manifest import Source, read_manifest
from mixchat.weights.format.workspace import workspace

WEIGHTS = (".gguf", ".safetensors")
# llama.cpp has no limits of OLMoE's heads, and no scale of LFM2's experts.
CHANGES: dict[str, dict[str, Any]] = {
    "olmoe": {"clip_qkv": None},
    "lfm2_moe": {"routed_scaling_factor": 1.0},
}
CASES = {
    **{family: (family, CHANGES.get(family, {})) for family in gguf_files.ARCHITECTURES},
    "granitemoehybrid, rope": ("granitemoehybrid", {"position_embedding_type": "rope"}),
    "dots1, weights not normalized": ("dots1", {"norm_topk_prob": False}),
}


def install_from(path: Path, target: Path, **options: str) -> dict[str, bytes]:
    """Install a checkpoint, and return its files of weights."""
    with open_checkpoint(Source(str(path)), target, NoProgress()) as opened:
        CheckpointBuild(
            opened, target, make_blueprint(opened.index, QuantizeOptions(**options))
        ).run()
    assert verify(target, NoProgress()) == []
    return weights_of(target)


def weights_of(model: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(model).items() if name.endswith(".safetensors")}


def assert_same(made: dict[str, bytes], own: dict[str, bytes]) -> None:
    """The logarithm of an exponential alone may not be what it was in its last bits."""
    assert {**made, SHARED_FILE: b""} == {**own, SHARED_FILE: b""}
    made_tensors, tensors = load(made[SHARED_FILE]), load(own[SHARED_FILE])
    assert made_tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if name.endswith("A_log"):
            torch.testing.assert_close(made_tensors[name], tensor)
        else:
            assert torch.equal(made_tensors[name], tensor), name


def metadata_of(checkpoint: Path, **changes: Any) -> dict[str, Any]:
    """Return the metadata of a checkpoint's GGUF, with changes. None leaves a key out."""
    raw, _ = gguf_files.read(checkpoint)
    family = gguf_files.ARCHITECTURES[gguf_files.family_of(raw)]
    name = gguf.MODEL_ARCH_NAMES[family]
    changed = {f"{name}.{key}": value for key, value in changes.items()}
    metadata = {"general.architecture": name, **gguf_files.metadata_of(raw, name), **changed}
    return {key: value for key, value in metadata.items() if value is not None}


@pytest.fixture(scope="module")
def mixtral(make_checkpoint: Callable[..., Path]) -> Path:
    """A Mixtral of one layer. Do not write into it."""
    return make_checkpoint(vocab_size=262, num_hidden_layers=1)


@pytest.mark.parametrize("family", gguf_files.ARCHITECTURES)
def test_each_family_is_installed_as_from_its_own_checkpoint(family, make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(model_type=family, vocab_size=262)
    path = gguf_files.write(checkpoint, tmp_path / "model.gguf")
    # Not rounded, so that every weight shows.
    made = install_from(path, tmp_path / "made", quant_type="none")
    assert_same(made, install_from(checkpoint, tmp_path / "own", quant_type="none"))


@pytest.mark.parametrize("name", CASES)
def test_its_config_is_that_of_its_own_checkpoint(name, make_checkpoint):
    """Granite's hybrid never rotated, although its files say so: logits were 31% off."""
    family, changes = CASES[name]
    checkpoint = make_checkpoint(model_type=family, vocab_size=262, **changes)
    own = read_config_file(checkpoint / "config.json")
    tensors = gguf_files.tensors_of(*gguf_files.read(checkpoint))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # A file has other keys for the ends of an answer, and no count of layers left out.
    unsaid = ("eos_token_ids", "num_nextn_predict_layers", "left_out")
    same = {key: getattr(own, key) for key in unsaid}
    if family == "glm4_moe_lite":
        same["model_type"] = family
    found = read_config(gguf_config(metadata_of(checkpoint), shapes, "x"))
    assert replace(found, **same) == own


ROTATES, ROPE_TYPE = "rope.scaling.finetuned", "rope_parameters.rope_type"
LINEAR = {ROPE_TYPE: "linear", "rope_parameters.factor": 4.0}
# Changes of a file's metadata, and what is read of it.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # DeepSeek-V3's scale of 2.5, its 3 dense layers and its 8 groups were those of every file.
    "missing keys have llama.cpp's values": (
        "deepseek_v3",
        dict.fromkeys(("expert_weights_norm", "expert_weights_scale", "leading_dense_block_count")),
        {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0},
    ),
    "no groups of experts": (
        "glm4_moe_lite",
        dict.fromkeys(("expert_group_count", "expert_group_used_count")),
        {"n_group": 1, "topk_group": 1},
    ),
    "a hybrid rotates": ("granitemoehybrid", {ROTATES: True}, {ROPE_TYPE: "default"}),
    "a hybrid does not": ("granitemoehybrid", {ROTATES: False}, {ROPE_TYPE: "nope"}),
    "a hybrid says nothing": ("granitemoehybrid", {ROTATES: None}, {ROPE_TYPE: "default"}),
    # The factor of a file that names no type had no effect.
    "no scaling": ("qwen3_moe", {}, {ROPE_TYPE: "default"}),
    "a type alone": ("qwen3_moe", {"rope.scaling.type": "linear"}, {ROPE_TYPE: "default"}),
    "a factor that does not count": (
        "qwen3_moe",
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {ROPE_TYPE: "default", "rope_parameters.factor": 1.0},
    ),
    "a factor alone is linear": ("qwen3_moe", {"rope.scaling.factor": 4.0}, LINEAR),
    "an old factor is linear": ("qwen3_moe", {"rope.scale_linear": 4.0}, LINEAR),
    "blocks that predict further tokens are no layers": (
        "qwen3_5_moe",
        {"block_count": 4, "nextn_predict_layers": 1},
        {"num_hidden_layers": 3},
    ),
    "layers without key heads have states": (
        "qwen3_5_moe",
        {"attention.head_count_kv": [0, 0, 2]},
        {
            "num_key_value_heads": 2,
            "layer_types": ("linear_attention", "linear_attention", "full_attention"),
        },
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_of_a_file_is_read_as_llama_cpp_reads_it(name, make_checkpoint):
    family, changes, expected = VARIANTS[name]
    metadata = metadata_of(make_checkpoint(model_type=family), **changes)
    config = read_config(gguf_config(metadata, {"token_embd.weight": (9, 64)}, "x"))
    assert {key: attrgetter(key)(config) for key in expected} == expected


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral4", {"attention.temperature_length": 9}, "grow every 9 tokens"),
        # The weights of a softmax that sum to one were read as DeepSeek-V2's, which do not.
        ("deepseek_v2", {"expert_weights_norm": True}, "norm_topk_prob cannot be True"),
        *(
            ("lfm2_moe", {"attention.head_count_kv": heads}, "num_key_value_heads|layer_types")
            for heads in ([], [0], [2, 0, "x"], [[2]], [1, 2], 0, "2")
        ),
        *(
            ("gemma4", {"attention.sliding_window_pattern": windows}, "num_key_value_heads")
            for windows in ([], [True, False], [True, False, "x"], 1)
        ),
    ],
)
def test_what_a_family_cannot_be_is_refused(family, changes, message, make_checkpoint):
    metadata = metadata_of(make_checkpoint(model_type=family), **changes)
    with pytest.raises(CheckpointError, match=message):
        read_config(gguf_config(metadata, {"token_embd.weight": (9, 64)}, "x"))


def test_every_other_architecture_is_refused_by_its_name():
    run = {gguf.MODEL_ARCH_NAMES[number] for number in gguf_files.ARCHITECTURES.values()}
    others = {*gguf.MODEL_ARCH_NAMES.values()} - run
    assert len(others) > 80
    for other in others:
        with pytest.raises(CheckpointError, match="does not run the architecture") as caught:
            gguf_config({"general.architecture": other, f"{other}.expert_count": 8}, {}, "x")
        assert f"'{other}'" in str(caught.value)


Weights = dict[str, torch.Tensor]


def unsaid_sigmoid(config: Any, weights: Weights, tensors: Weights) -> dict[str, Any]:
    """Corrections alone tell it in GLM-4.7-Flash's files, which were read as DeepSeek-V2's."""
    return {"deepseek2.expert_gating_func": None}


def one_matrix_before_states(config: Any, weights: Weights, tensors: Weights) -> dict[str, Any]:
    for name in [name for name in tensors if "attn_qkv" in name]:
        layer = name.split(".")[1]
        del tensors[name], tensors[f"blk.{layer}.attn_gate.weight"]
        whole = weights[f"model.layers.{layer}.linear_attn.in_proj_qkvz.weight"]
        tensors[f"blk.{layer}.ssm_in.weight"] = whole
    return {}


def keys_and_values_in_one(config: Any, weights: Weights, tensors: Weights) -> dict[str, Any]:
    for name in [name for name in tensors if "attn_k_b" in name or "attn_v_b" in name]:
        del tensors[name]
    for layer in range(config["num_hidden_layers"]):
        whole = weights[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
        tensors[f"blk.{layer}.attn_kv_b.weight"] = whole
    changes = {
        "key_length_mla": None,
        "value_length_mla": None,
        "head_count_kv": config["num_attention_heads"],
        "key_length": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        "value_length": config["v_head_dim"],
    }
    return {f"deepseek2.attention.{key}": value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("glm4_moe_lite", unsaid_sigmoid),
        ("qwen3_next", one_matrix_before_states),
        ("deepseek_v2", keys_and_values_in_one),
        ("deepseek_v3", keys_and_values_in_one),
    ],
)
def test_an_older_file_is_installed_as_from_its_own_checkpoint(
    family, change, make_checkpoint, tmp_path
):
    checkpoint, path = make_checkpoint(model_type=family, vocab_size=262), tmp_path / "model.gguf"
    config, weights = gguf_files.read(checkpoint)
    tensors = gguf_files.tensors_of(config, weights)
    changes = change(config, weights, tensors)
    gguf_files.write_tensors(path, config, tensors, "F32", changes=changes)
    made = install_from(path, tmp_path / "made")
    assert_same(made, install_from(checkpoint, tmp_path / "own"))


@pytest.mark.parametrize(
    ("family", "changes", "form"),
    [
        ("qwen3_moe", {}, {"joined": True}),  # gate and up in one matrix
        ("mixtral", {}, {"separate": True}),  # as old files have each matrix of an expert
        ("deepseek_v2", {"q_lora_rank": None}, {}),
    ],
)
def test_matrices_may_be_joined_or_apart_and_queries_without_a_latent(
    family, changes, form, make_checkpoint, tmp_path
):
    checkpoint = make_checkpoint(model_type=family, vocab_size=262, **changes)
    path = gguf_files.write(checkpoint, tmp_path / "model.gguf", **form)
    made = install_from(path, tmp_path / "made")
    assert made == install_from(checkpoint, tmp_path / "own")


def test_mxfp4_is_taken_over_without_rounding(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint(model_type="gpt_oss", vocab_size=262, stored_as="bfloat16")
    path = gguf_files.write(checkpoint, tmp_path / "model.gguf", "MXFP4")
    published = gguf_files.published(checkpoint, tmp_path / "published")
    made, own = (install_from(source, tmp_path / source.stem / "m") for source in (path, published))
    assert made["experts-000.safetensors"] == own["experts-000.safetensors"]
    quantization = read_manifest(tmp_path / "model" / "m").quantization
    assert (quantization["quant_type"], quantization["attention"]) == ("mxfp4", "int8")


@pytest.mark.parametrize("kind", ["F16", "Q4_1", "Q8_0"])
def test_each_kind_is_installed_as_the_weights_that_it_has(kind, mixtral, tmp_path):
    path = gguf_files.write(mixtral, tmp_path / "model.gguf", kind)
    made = install_from(path, tmp_path / "made")
    rounded = gguf_files.rounded(mixtral, tmp_path / "rounded", kind)
    assert made == install_from(rounded, tmp_path / "own")


class TestOnTheHub:
    @pytest.fixture
    def hub(
        self, mixtral: Path, make_hub: Callable[..., FakeHub], tmp_path: Path, home: Path
    ) -> FakeHub:
        """A hub with the tiny Mixtral in two kinds of GGUF, one in parts in a folder."""
        files = tmp_path / "files"
        gguf_files.write(mixtral, files / "tiny-v0.1.Q8_0.gguf", "Q8_0")
        gguf_files.write(mixtral, tmp_path / "parts" / "tiny-Q4_0.gguf", "Q4_0", parts=3)
        (files / "config.json").write_text("{}")
        parts = {f"Q4_0/{name}": data for name, data in files_of(tmp_path / "parts").items()}
        return make_hub(files, **parts, **{"mmproj-F16.gguf": b"GGUF"})

    def test_kinds_are_listed_if_none_is_named(self, hub):
        for name, message in ((REPO, "several models"), (f"{REPO}:Q2_K", "has no Q2_K")):
            with pytest.raises(UsageError, match=message) as caught:
                get(name)
            assert "Q4_0, Q8_0" in str(caught.value.hint)
        assert not hub.got("store")

    @pytest.mark.parametrize(("kind", "file"), [("q8_0", "tiny-v0.1.Q8_0"), ("Q4_0", "tiny-Q4_0")])
    def test_a_kind_is_installed_as_from_the_file(self, hub, kind, file, tmp_path, mixtral):
        meter = Meter()
        made = get(f"{REPO}:{kind}", meter=meter)
        local = gguf_files.write(mixtral, tmp_path / "local" / f"{file}.gguf", kind.upper())
        assert weights_of(made) == install_from(local, tmp_path / "own")
        assert made.name == f"{REPO.replace('/', '--')}--{kind}"
        assert resolve(made.name).repo == f"{REPO}:{kind}"
        assert all(kind.upper() in path for path in hub.got("store"))

    def test_a_plan_asks_for_the_disk_of_the_whole_file_beside_the_model(self, hub, monkeypatch):
        """Its SHA-256 is the whole file's, so that no part of it may be used or removed before."""
        monkeypatch.setattr(download_plan, "SMALL_FILES_BYTES", 0)
        ref, taken, drop = resolve(f"{REPO}:Q8_0"), list[int](), Spill.keep_only

        def measure(spill: Spill, names: set[str]) -> None:
            place = workspace(ref.directory)
            files = [path for path in place.rglob("*") if path.suffix in WEIGHTS]
            taken.append(sum(path.stat().st_size for path in files))
            drop(spill, names)

        monkeypatch.setattr(Spill, "keep_only", measure)
        plan = plan_download(DownloadRequest(ref, QuantizeOptions()), NoProgress())
        assert plan is not None
        assert plan.fetch == plan.checkpoint == len(hub.files["tiny-v0.1.Q8_0.gguf"])
        get(f"{REPO}:Q8_0")
        assert plan.disk[0].needed == pytest.approx(max(taken), rel=0.05)
        assert plan.disk[0].needed > plan.checkpoint + 0.9 * plan.installed

    def test_a_damaged_part_is_fetched_by_ranges(self, hub):
        model = get(f"{REPO}:Q8_0")
        before, name = files_of(model), "experts-000.safetensors"
        (model / name).write_bytes(before[name][:-9] + b"damaged!!")
        damages, source = verify(model, NoProgress()), read_manifest(model).source
        hub.requests.clear()
        with open_checkpoint(source, model, NoProgress()) as opened:
            repair(model, damages, opened, NoProgress())
        assert files_of(model) == before
        assert all(request.range for request in hub.requests if request.where == "store")

    def test_kept_files_are_used_offline(self, hub, monkeypatch):
        from huggingface_hub import constants

        made = weights_of(get(f"{REPO}:Q4_0", keep_source=True))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert weights_of(get(f"{REPO}:Q4_0", key="again")) == made


class TestFiles:
    def test_parts_are_found_beside_the_first(self, mixtral, tmp_path):
        gguf_files.write(mixtral, tmp_path / "tiny.gguf", parts=3)
        first = tmp_path / "tiny-00001-of-00003.gguf"
        assert install_from(first, tmp_path / "a") == install_from(mixtral, tmp_path / "b")
        (tmp_path / "tiny-00002-of-00003.gguf").unlink()
        with pytest.raises(CheckpointError, match="2 of the 3 parts"):
            install_from(first, tmp_path / "c")

    def test_a_file_names_its_model(self, mixtral, tmp_path, home):
        path = gguf_files.write(mixtral, tmp_path / "tiny-Q8_0.gguf", "Q8_0")
        assert get(str(path)).name == "tiny-Q8_0"
        assert list(tmp_path.glob("*.json")) == []
