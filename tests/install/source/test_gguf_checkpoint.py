"""Models in GGUF: installed, they are those of the Hugging Face checkpoints they were made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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


@pytest.fixture(scope="module")
def mixtral(make_checkpoint: Callable[..., Path]) -> Path:
    """A Mixtral of one layer. Do not write into it."""
    return make_checkpoint(vocab_size=262, num_hidden_layers=1)


class TestFamilies:
    @pytest.mark.parametrize("family", gguf_files.ARCHITECTURES)
    def test_each_is_installed_as_from_its_own_checkpoint(
        self, family: str, make_checkpoint: Callable[..., Path], tmp_path: Path
    ) -> None:
        checkpoint = make_checkpoint(model_type=family, vocab_size=262)
        path = gguf_files.write(checkpoint, tmp_path / "model.gguf")
        # Not rounded, so that every weight shows.
        made = install_from(path, tmp_path / "made", quant_type="none")
        own = install_from(checkpoint, tmp_path / "own", quant_type="none")
        assert {**made, SHARED_FILE: b""} == {**own, SHARED_FILE: b""}
        made_tensors, tensors = load(made[SHARED_FILE]), load(own[SHARED_FILE])
        # The logarithm of an exponential is not what it was in its last bits.
        rounded = {name for name in tensors if name.endswith("A_log")}
        for name in rounded:
            torch.testing.assert_close(made_tensors[name], tensors[name])
        exact = tensors.keys() - rounded
        assert [name for name in exact if not torch.equal(made_tensors[name], tensors[name])] == []
        assert made_tensors.keys() == tensors.keys()

    @pytest.mark.parametrize("name", CASES)
    def test_its_config_is_that_of_its_own_checkpoint(
        self, name: str, make_checkpoint: Callable[..., Path]
    ) -> None:
        """Granite's hybrid never rotated, although its files say so: logits were 31% off."""
        family, changes = CASES[name]
        checkpoint = make_checkpoint(model_type=family, vocab_size=262, **changes)
        own = read_config_file(checkpoint / "config.json")
        raw, weights = gguf_files.read(checkpoint)
        architecture = gguf.MODEL_ARCH_NAMES[gguf_files.ARCHITECTURES[family]]
        metadata = gguf_files.metadata_of(raw, architecture)
        metadata["general.architecture"] = architecture
        tensors = gguf_files.tensors_of(raw, weights)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        # A file has other keys for the ends of an answer, and no count of layers left out.
        unsaid = ("eos_token_ids", "num_nextn_predict_layers", "left_out")
        same = {key: getattr(own, key) for key in unsaid}
        if family == "glm4_moe_lite":
            same["model_type"] = family
        assert replace(read_config(gguf_config(metadata, shapes, "x")), **same) == own

    def test_a_key_that_a_file_lacks_has_llama_cpps_value(
        self, make_checkpoint: Callable[..., Path]
    ) -> None:
        """DeepSeek-V3's scale of 2.5 and its 3 dense layers were those of every such file."""
        config, _ = gguf_files.read(make_checkpoint(model_type="deepseek_v3"))
        metadata = gguf_files.metadata_of(config, "deepseek2")
        keys = ("expert_weights_norm", "expert_weights_scale", "leading_dense_block_count")
        short = {key: value for key, value in metadata.items() if not key.endswith(keys)}
        read = read_config(
            gguf_config(
                {"general.architecture": "deepseek2", **short}, {"token_embd.weight": (9, 64)}, "x"
            )
        )
        assert not read.norm_topk_prob
        assert (read.routed_scaling_factor, read.first_k_dense_replace) == (1.0, 0)

    @pytest.mark.parametrize(("said", "rope_type"), [(True, "default"), (False, "nope")])
    @pytest.mark.parametrize("missing", [False, True])
    def test_granites_hybrid_rotates_unless_its_file_says_that_it_does_not(
        self, said: bool, rope_type: str, missing: bool, make_checkpoint: Callable[..., Path]
    ) -> None:
        config, _ = gguf_files.read(make_checkpoint(model_type="granitemoehybrid"))
        name, key = "granitehybrid", "granitehybrid.rope.scaling.finetuned"
        metadata = {"general.architecture": name, **gguf_files.metadata_of(config, name), key: said}
        if missing:
            del metadata[key]
        read = read_config(gguf_config(metadata, {"token_embd.weight": (9, 64)}, "x"))
        assert read.rope_parameters.rope_type == ("default" if missing else rope_type)

    @pytest.mark.parametrize(
        ("scaling", "expected"),
        [
            ({}, ("default", 1.0)),
            ({"scaling.type": "linear"}, ("default", 1.0)),
            ({"scaling.type": "none", "scaling.factor": 4.0}, ("default", 1.0)),
            ({"scaling.factor": 4.0}, ("linear", 4.0)),
            ({"scale_linear": 2.0}, ("linear", 2.0)),
        ],
    )
    def test_a_rope_with_a_factor_alone_is_linear(
        self,
        scaling: dict[str, Any],
        expected: tuple[str, float],
        make_checkpoint: Callable[..., Path],
    ) -> None:
        """The factor of a file that names no type had no effect."""
        config, _ = gguf_files.read(make_checkpoint(model_type="qwen3_moe"))
        metadata = gguf_files.metadata_of(config, "qwen3moe")
        metadata |= {f"qwen3moe.rope.{key}": value for key, value in scaling.items()}
        metadata["general.architecture"] = "qwen3moe"
        rope = read_config(
            gguf_config(metadata, {"token_embd.weight": (9, 64)}, "x")
        ).rope_parameters
        assert (rope.rope_type, rope.factor) == expected

    def test_queries_that_grow_with_another_length_than_the_original_context_are_refused(
        self, make_checkpoint: Callable[..., Path]
    ) -> None:
        config, _ = gguf_files.read(make_checkpoint(model_type="mistral4"))
        metadata = gguf_files.metadata_of(config, "mistral4")
        metadata |= {"general.architecture": "mistral4", "mistral4.attention.temperature_length": 9}
        with pytest.raises(CheckpointError, match="grow every 9 tokens"):
            gguf_config(metadata, {}, "x")

    def test_a_file_without_groups_of_experts_has_none(
        self, make_checkpoint: Callable[..., Path]
    ) -> None:
        """DeepSeek-V3's 8 groups were those of every file that named none."""
        config, _ = gguf_files.read(make_checkpoint(model_type="glm4_moe_lite"))
        metadata = gguf_files.metadata_of(config, "deepseek2")
        old = {key: value for key, value in metadata.items() if "expert_group" not in key}
        found = gguf_config({"general.architecture": "deepseek2", **old}, {}, "x")
        assert (found["n_group"], found["topk_group"]) == (1, 1)

    def test_a_file_with_corrections_of_scores_has_those_of_a_sigmoid(
        self, make_checkpoint: Callable[..., Path], tmp_path: Path
    ) -> None:
        """Published files of GLM-4.7-Flash do not say it, and were read as DeepSeek-V2's."""
        checkpoint = make_checkpoint(model_type="glm4_moe_lite", vocab_size=262)
        config, weights = gguf_files.read(checkpoint)
        path, tensors = tmp_path / "model.gguf", gguf_files.tensors_of(config, weights)
        unsaid = {"deepseek2.expert_gating_func": None}
        gguf_files.write_tensors(path, config, tensors, "F32", changes=unsaid)
        made = install_from(path, tmp_path / "made")
        assert made == install_from(checkpoint, tmp_path / "own")

    def test_what_a_family_cannot_be_is_refused(self) -> None:
        """The weights of a softmax that sum to one were read as DeepSeek-V2's, which do not."""
        metadata = {
            "general.architecture": "deepseek2",
            "deepseek2.expert_gating_func": 1,
            "deepseek2.expert_weights_norm": True,
        }
        with pytest.raises(CheckpointError, match="norm_topk_prob cannot be True"):
            gguf_config(metadata, {}, "x")

    def test_every_other_architecture_is_refused_by_its_name(self) -> None:
        run = {gguf.MODEL_ARCH_NAMES[number] for number in gguf_files.ARCHITECTURES.values()}
        others = {*gguf.MODEL_ARCH_NAMES.values()} - run
        assert len(others) > 80
        for other in others:
            with pytest.raises(CheckpointError, match="does not run the architecture") as caught:
                gguf_config({"general.architecture": other, f"{other}.expert_count": 8}, {}, "x")
            assert f"'{other}'" in str(caught.value)

    @pytest.mark.parametrize(
        ("family", "changes", "form"),
        [
            ("qwen3_moe", {}, {"joined": True}),  # gate and up in one matrix
            ("mixtral", {}, {"separate": True}),  # as old files have each matrix of an expert
            ("deepseek_v2", {"q_lora_rank": None}, {}),
        ],
    )
    def test_matrices_may_be_joined_or_apart_and_queries_without_a_latent(
        self,
        family: str,
        changes: dict[str, Any],
        form: dict[str, bool],
        make_checkpoint: Callable[..., Path],
        tmp_path: Path,
    ) -> None:
        checkpoint = make_checkpoint(model_type=family, vocab_size=262, **changes)
        path = gguf_files.write(checkpoint, tmp_path / "model.gguf", **form)
        made = install_from(path, tmp_path / "made")
        assert made == install_from(checkpoint, tmp_path / "own")

    def test_an_old_qwen3_next_has_one_matrix_before_its_states(
        self, make_checkpoint: Callable[..., Path], tmp_path: Path
    ) -> None:
        checkpoint = make_checkpoint(model_type="qwen3_next", vocab_size=262)
        config, weights = gguf_files.read(checkpoint)
        tensors = gguf_files.tensors_of(config, weights)
        for name in [name for name in tensors if "attn_qkv" in name]:
            layer = name.split(".")[1]
            del tensors[name], tensors[f"blk.{layer}.attn_gate.weight"]
            whole = weights[f"model.layers.{layer}.linear_attn.in_proj_qkvz.weight"]
            tensors[f"blk.{layer}.ssm_in.weight"] = whole
        path = tmp_path / "model.gguf"
        gguf_files.write_tensors(path, config, tensors, "F32")
        made = install_from(path, tmp_path / "made")
        own = install_from(checkpoint, tmp_path / "own")
        assert {**made, SHARED_FILE: b""} == {**own, SHARED_FILE: b""}
        made_tensors, tensors = load(made[SHARED_FILE]), load(own[SHARED_FILE])
        assert torch.equal(
            *(x["model.layers.0.linear_attn.in_proj.codes"] for x in (made_tensors, tensors))
        )

    @pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
    def test_an_old_deepseek_has_keys_and_values_in_one_matrix(
        self, family: str, make_checkpoint: Callable[..., Path], tmp_path: Path
    ) -> None:
        checkpoint = make_checkpoint(model_type=family, vocab_size=262)
        config, weights = gguf_files.read(checkpoint)
        tensors = gguf_files.tensors_of(config, weights)
        for name in [name for name in tensors if "attn_k_b" in name or "attn_v_b" in name]:
            del tensors[name]
        for layer in range(config["num_hidden_layers"]):
            whole = weights[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
            tensors[f"blk.{layer}.attn_kv_b.weight"] = whole
        lengths = {
            "head_count_kv": config["num_attention_heads"],
            "key_length": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
            "value_length": config["v_head_dim"],
        }
        path = tmp_path / "model.gguf"
        changed = {"key_length_mla": None, "value_length_mla": None, **lengths}
        changes = {f"deepseek2.attention.{key}": value for key, value in changed.items()}
        gguf_files.write_tensors(path, config, tensors, "F32", changes=changes)
        made = install_from(path, tmp_path / "made")
        assert made == install_from(checkpoint, tmp_path / "own")

    @pytest.mark.parametrize("heads", [[], [0], [2, 0, "x"], [[2]], [1, 2], 0, "2"])
    @pytest.mark.parametrize("windows", [None, [], [True, False], [True, False, "x"], 1])
    def test_key_heads_of_layers_that_cannot_be_are_refused(
        self, heads: object, windows: object
    ) -> None:
        for architecture in ("lfm2moe", "gemma4"):
            metadata = {
                "general.architecture": architecture,
                f"{architecture}.attention.head_count_kv": heads,
                f"{architecture}.attention.sliding_window_pattern": windows,
            }
            with pytest.raises(CheckpointError):
                read_config(gguf_config(metadata, {}, "x"))

    def test_the_blocks_of_qwen3_5_that_predict_further_tokens_are_not_its_layers(self) -> None:
        metadata = {
            "general.architecture": "qwen35moe",
            "qwen35moe.block_count": 9,
            "qwen35moe.nextn_predict_layers": 1,
            "qwen35moe.full_attention_interval": 4,
        }
        raw = gguf_config(metadata, {}, "x")
        assert (raw["num_hidden_layers"], raw["num_nextn_predict_layers"]) == (8, 1)

    def test_layers_of_qwen3_5_without_key_heads_have_states(self) -> None:
        metadata = {
            "general.architecture": "qwen35moe",
            "qwen35moe.attention.head_count_kv": [0, 0, 0, 2],
        }
        raw = gguf_config(metadata, {}, "x")
        assert raw["num_key_value_heads"] == 2
        assert raw["layer_types"] == [*["linear_attention"] * 3, "full_attention"]

    def test_mxfp4_is_taken_over_without_rounding(
        self, make_checkpoint: Callable[..., Path], tmp_path: Path
    ) -> None:
        checkpoint = make_checkpoint(model_type="gpt_oss", vocab_size=262, stored_as="bfloat16")
        path = gguf_files.write(checkpoint, tmp_path / "model.gguf", "MXFP4")
        published = gguf_files.published(checkpoint, tmp_path / "published")
        made, own = (
            install_from(source, tmp_path / source.stem / "m") for source in (path, published)
        )
        assert made["experts-000.safetensors"] == own["experts-000.safetensors"]
        quantization = read_manifest(tmp_path / "model" / "m").quantization
        assert (quantization["quant_type"], quantization["attention"]) == ("mxfp4", "int8")


@pytest.mark.parametrize("kind", ["F16", "Q4_1", "Q8_0"])
def test_each_kind_is_installed_as_the_weights_that_it_has(
    kind: str, mixtral: Path, tmp_path: Path
) -> None:
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

    def test_kinds_are_listed_if_none_is_named(self, hub: FakeHub) -> None:
        for name, message in ((REPO, "several models"), (f"{REPO}:Q2_K", "has no Q2_K")):
            with pytest.raises(UsageError, match=message) as caught:
                get(name)
            assert "Q4_0, Q8_0" in str(caught.value.hint)
        assert not hub.got("store")

    @pytest.mark.parametrize(("kind", "file"), [("q8_0", "tiny-v0.1.Q8_0"), ("Q4_0", "tiny-Q4_0")])
    def test_a_kind_is_installed_as_from_the_file(
        self, hub: FakeHub, kind: str, file: str, tmp_path: Path, mixtral: Path
    ) -> None:
        meter = Meter()
        made = get(f"{REPO}:{kind}", meter=meter)
        local = gguf_files.write(mixtral, tmp_path / "local" / f"{file}.gguf", kind.upper())
        assert weights_of(made) == install_from(local, tmp_path / "own")
        assert made.name == f"{REPO.replace('/', '--')}--{kind}"
        assert resolve(made.name).repo == f"{REPO}:{kind}"
        assert all(kind.upper() in path for path in hub.got("store"))

    def test_a_plan_reads_headers_alone(self, hub: FakeHub) -> None:
        request = DownloadRequest(resolve(f"{REPO}:Q8_0"), QuantizeOptions())
        plan = plan_download(request, NoProgress())
        assert plan is not None
        assert plan.fetch == plan.checkpoint == len(hub.files["tiny-v0.1.Q8_0.gguf"])

    def test_a_plan_asks_for_the_disk_of_the_whole_file_beside_the_model(
        self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
        get(f"{REPO}:Q8_0")
        assert plan.disk[0].needed == pytest.approx(max(taken), rel=0.05)
        assert plan.disk[0].needed > plan.checkpoint + 0.9 * plan.installed

    def test_a_damaged_part_is_fetched_by_ranges(self, hub: FakeHub) -> None:
        model = get(f"{REPO}:Q8_0")
        before, name = files_of(model), "experts-000.safetensors"
        (model / name).write_bytes(before[name][:-9] + b"damaged!!")
        damages, source = verify(model, NoProgress()), read_manifest(model).source
        hub.requests.clear()
        with open_checkpoint(source, model, NoProgress()) as opened:
            repair(model, damages, opened, NoProgress())
        assert files_of(model) == before
        assert all(request.range for request in hub.requests if request.where == "store")

    def test_kept_files_are_used_offline(
        self, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from huggingface_hub import constants

        made = weights_of(get(f"{REPO}:Q4_0", keep_source=True))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert weights_of(get(f"{REPO}:Q4_0", key="again")) == made


class TestFiles:
    def test_parts_are_found_beside_the_first(self, mixtral: Path, tmp_path: Path) -> None:
        gguf_files.write(mixtral, tmp_path / "tiny.gguf", parts=3)
        first = tmp_path / "tiny-00001-of-00003.gguf"
        assert install_from(first, tmp_path / "a") == install_from(mixtral, tmp_path / "b")
        (tmp_path / "tiny-00002-of-00003.gguf").unlink()
        with pytest.raises(CheckpointError, match="2 of the 3 parts"):
            install_from(first, tmp_path / "c")

    def test_a_file_names_its_model(self, mixtral: Path, tmp_path: Path, home: Path) -> None:
        path = gguf_files.write(mixtral, tmp_path / "tiny-Q8_0.gguf", "Q8_0")
        assert get(str(path)).name == "tiny-Q8_0"
        assert list(tmp_path.glob("*.json")) == []
