"""Tiny random models as transformers writes them, and the models installed from them."""

from __future__ import annotations

import gc
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Tiny models gain nothing from more threads, which wait for each other where cores are busy. Nor
# does any command measure then, in its new data directory, how many threads are best.
os.environ["OMP_NUM_THREADS"] = "1"
# A thread that waits gives its core to the tests of other processes.
os.environ["GOMP_SPINCOUNT"] = "1000"

import pytest
import torch
from hypothesis import HealthCheck, settings

# What nohup and shells in the background ignore, the processes of tests would ignore, too. Ctrl-C
# has to end them.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, lambda *_: None),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

# On a busy machine, a test takes longer than hypothesis allows by default.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Kernels for GPUs run on the CPU, unless tests/gpu.sh names a card. Triton reads this as it defines
# them.
if os.environ.get("MIXCHAT_TEST_GPU", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
# Nothing here may reach a hub: transformers and huggingface_hub read these when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Nor may anything be written to the data directory of the person who runs this.
_HOME = tempfile.TemporaryDirectory(prefix="mixchat-tests-")
os.environ["MIXCHAT_HOME"] = _HOME.name

# Programs that tests start find what several rooms share, too.
_TOOLS = str(Path(__file__).parent / "tools")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_TOOLS, os.environ.get("PYTHONPATH")]))

_DIED = pytest.StashKey[bool]()

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Three heads of keys, and nine of values, which are not as wide.
HYBRID: dict[str, Any] = {
    "num_experts": 4,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 192,
    "num_hidden_layers": 3,
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 9,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
}
_LATENT = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 4,
    "moe_intermediate_size": 128,
    "intermediate_size": 192,
}
# The changes that make a family's tiny model of `TINY`, with all that the family has.
TINY_FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"moe_intermediate_size": 128, "norm_topk_prob": True},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 192,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
    },
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "moe_intermediate_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    "glm4_moe": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "head_dim": 32,
        "attention_bias": True,
        "use_qk_norm": True,
        "routed_scaling_factor": 2.5,
    },
    "glm4_moe_lite": {**_LATENT, "q_lora_rank": 48, "routed_scaling_factor": 1.8},
    "deepseek_v2": {
        **_LATENT,
        "q_lora_rank": 48,
        "first_k_dense_replace": 1,
        "n_shared_experts": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 32,
        },
    },
    "deepseek_v3": {
        **_LATENT,
        "q_lora_rank": 48,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_mtp_layers": 0,
    },
    "mistral4": {
        **_LATENT,
        "qk_nope_head_dim": 16,
        "head_dim": 32,
        "q_lora_rank": 48,
        "norm_topk_prob": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        },
    },
    "laguna": {
        "num_experts": 4,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 192,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "num_attention_heads_per_layer": [4, 6, 4, 6],
        "head_dim": 32,
        "sliding_window": 9,
        "moe_routed_scaling_factor": 2.5,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 5e5,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
            },
        },
    },
    "minimax_m2": {"rotary_dim": 8},
    "qwen3_next": HYBRID,
    "qwen3_5_moe": HYBRID,
    "lfm2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "routed_scaling_factor": 1.5,
    },
    "gemma4": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 9,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 5.0,
    },
    "mellum": {
        "moe_intermediate_size": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
    },
    "olmoe": {"clip_qkv": 1.5},
    "granitemoe": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
    },
    # Three groups of six heads.
    "granitemoehybrid": {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "shared_intermediate_size": 192,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 6,
        "mamba_expand": 3,
        "mamba_n_groups": 3,
        "mamba_d_state": 32,
    },
    "gpt_oss": {
        "sliding_window": 9,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1.5e5,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    },
}


def quantize_stacks(directory: Path) -> None:
    """Replace each stack of matrices [E, in, out] by its blocks and scales in MXFP4."""
    from safetensors.torch import load_file, save_file

    from mixchat.weights.matrix.mxfp4 import MXFP4

    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if weight.dim() < 3:
            stored[name] = weight
            continue
        experts, columns, rows = weight.shape
        codes, scales = MXFP4.codes(weight.transpose(1, 2).reshape(-1, columns).float())
        shape = (experts, rows, columns // 32)
        stored[f"{name}_blocks"] = (codes << 4 | codes >> 4).view(*shape, 16)
        stored[f"{name}_scales"] = scales.view(shape)
    save_file(stored, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with slow files, then files of many tests. A long one at the end is waited for."""
    counts = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -counts[item.path]))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """End with pytest's code for internal errors if a process of xdist died.

    Its tests that are left never run. xdist counts one failure, which `.ci/run` would forgive.
    """
    if error:
        node.config.stash[_DIED] = True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell of a process that died, as `pytest_testnodedown` says."""
    if session.config.stash.get(_DIED, False):
        session.exitstatus = pytest.ExitCode.INTERNAL_ERROR


def pytest_collection_finish() -> None:
    """Leave out of each collection of garbage what all tests have: it takes a second, or two."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let Python free what was left out. Triton's library would complain of leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Give a test the same random tensors each time, whatever ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_held_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hold no file of the system for the next test. A server holds them until its process ends."""
    held: dict[Path, int] = {}
    monkeypatch.setattr("mixchat.base.held_files._held", held)
    monkeypatch.setattr("mixchat.base.held_files._holds", False)
    yield
    for descriptor in held.values():
        os.close(descriptor)


@pytest.fixture(scope="session", autouse=True)
def no_waits_for_the_disk() -> Iterator[None]:
    """Let `fsync` only check its descriptor. Thousands of real ones take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def shared_kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile each kernel once for all of xdist's workers, and keep all of them."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixchat.kernels.cpu.object_cache.data_dir", lambda: shared)
        patch.setattr("mixchat.kernels.cpu.object_cache._MOST_FILES", 10_000)
        yield


@pytest.fixture(scope="session", autouse=True)
def patient_with_sandboxes() -> Iterator[None]:
    """Wait longer for a sandbox, to which a busy machine gives less than a tenth of a core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixchat.text.sandbox._WALL_S_PER_CPU_S", 100)
        yield


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a random model with `TINY`'s config, changed as asked, and return its directory.

    Its weights are in fp32, or in the type that `stored_as` names ("float16"). "mxfp4" is gpt-oss
    as it is published, with its experts in MXFP4 and all else in bf16.
    """

    def make(
        *,
        model_type: str = "mixtral",
        seed: int = 0,
        std: float = 0.2,
        stored_as: str = "float32",
        **changes: Any,
    ) -> Path:
        from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        torch.manual_seed(seed)
        # A large spread makes the router's choices and the attention sharp, so that mistakes show.
        values = {**TINY, **TINY_FAMILIES[model_type], "initializer_range": std, **changes}
        names = {"num_experts": "num_local_experts", "moe_num_experts": "num_local_experts"}
        names |= {"n_routed_experts": "num_local_experts", "moe_k": "num_experts_per_tok"}
        names["top_k_experts"] = "num_experts_per_tok"
        for name in names.keys() & values.keys():  # transformers has one name or both
            values[name] = values[names[name]]
        # Of a model for text and images, the language model alone.
        own_type = f"{model_type}_text" if f"{model_type}_text" in CONFIG_MAPPING else model_type
        config = AutoConfig.for_model(own_type, **values)
        if model_type == "mistral4":  # for which transformers knows a model, but not from a config
            from transformers import Mistral4ForCausalLM

            AutoModelForCausalLM.register(type(config), Mistral4ForCausalLM, exist_ok=True)
        model = AutoModelForCausalLM.from_config(config)
        if model_type != "mixtral":  # transformers begins with norms of ones and biases of zeros
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or name.endswith("bias"):
                    parameter.data += std * torch.randn_like(parameter)
            for name, buffer in model.named_buffers():
                if name.endswith(("correction_bias", "layer_scalar")):
                    buffer += std * torch.randn_like(buffer)
        directory = tmp_path_factory.mktemp("checkpoint")
        published = stored_as == "mxfp4"
        model.to(torch.bfloat16 if published else getattr(torch, stored_as))
        model.save_pretrained(directory)
        if published:
            quantize_stacks(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """A random Mixtral of `TINY`'s shape. Do not write into it."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def install(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Install a checkpoint, with `QuantizeOptions` as given, and return the model's directory.

    forms: the types of each layer's w1 and w3, and w2.
    """

    def install(checkpoint: Path, forms: Sequence[Any] = (), **options: Any) -> Path:
        from mixchat.install.make.from_checkpoint import CheckpointBuild
        from mixchat.install.make.mix import mixed
        from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
        from mixchat.install.source.checkpoint import DirectoryCheckpoint
        from mixchat.weights.format.manifest import Source

        target = tmp_path_factory.mktemp("installed") / "model"
        opened = DirectoryCheckpoint(checkpoint, Source("test"))
        blueprint = make_blueprint(opened.index, QuantizeOptions(**options))
        CheckpointBuild(opened, target, mixed(blueprint, forms) if forms else blueprint).run()
        return target

    return install


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path, install: Callable[..., Path]) -> Path:
    """The model installed from `tiny_checkpoint`, in NF4. Do not write into it."""
    return install(tiny_checkpoint)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub, without a token and without waits between attempts."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    from mixchat.install.source import transfer

    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(transfer, "_WAITS_S", (0.0,) * 5)
    # The client's own waits, when it fetches the small files.
    no_wait = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(_http, "time", no_wait)
    return tmp_path / "cache"


@pytest.fixture
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `bench` find 1 GB/s of memory, 2 GFLOP/s and 3 GB/s of the disk, without measuring."""
    from mixchat.bench import rounds

    measured = SimpleNamespace(measure=lambda: rounds.Limits(memory=1e9, gemm=2e9))
    monkeypatch.setattr(rounds, "LimitsMeter", lambda *args, **options: measured)
    speeds = SimpleNamespace(disk_idle=3e9, gpus=())
    monkeypatch.setattr(rounds, "saved_speeds", lambda *given: speeds)
