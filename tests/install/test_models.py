"""Names of models, and the models on this machine."""

import json
import os
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixchat.base.errors import ModelNotFoundError, UsageError
from mixchat.base.machine import disk_usage
from mixchat.base.settings import report_path_by_key
from mixchat.install import models
from mixchat.install.known_models import ALIASES
from mixchat.weights.format.journal import JOURNAL_FILE
from mixchat.weights.format.manifest import (
    FileRecord,
    Manifest,
    Source,
    WeightsRecord,
    write_manifest,
)
from mixchat.weights.format.workspace import MODEL_DIR, workspace

QUANTIZATION = {
    "quant_type": "nf4",
    "blocksize": 64,
    "scales": "absmax",
    "attention": "none",
    "head": "none",
    "dtype": "bfloat16",
}
CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
# fmt: off
HOSTILE = [
    "", " ", "../x", "../../etc/passwd", "/etc/passwd", "a/../b", "a/b/c", "./../x/y", "org/..",
    "../name", "org/name/../..", "org/na--me", "org/na..me", "org/.name", "org/name.", "org/-name",
    "-org/name", "org/name.git", "org/name\n", "org/na\0me", "org/\u202ename", "org/name\x1b[31m",
    "\0", "a\0b", "org\\name", "C:\\models\\x", "org/n\u00e4me", "org/" + "n" * 97,
    "o" * 97 + "/name", "n" * 100_000, "\ud800", "org/\udc80", "//", "/", "~/x", "con/",
    "https://hub/org/name", "models--org--name", "org/name:", "org/name:../x", "org/name:a--b",
    "org/name:Q8_0:x", ":Q8_0", "org:Q8_0", "org/name:Q8_0\n", "/no/such.gguf", "no.gguf",
]
# fmt: on


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data directory, and an empty current directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MIXCHAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def keep(key: str, *, source: str = "org/name", finished: bool = True) -> Path:
    directory = models.models_dir() / key
    if not finished:
        (workspace(directory) / MODEL_DIR).mkdir(parents=True)
        (workspace(directory) / MODEL_DIR / "shared.safetensors").write_bytes(b"x" * 1000)
        (workspace(directory) / JOURNAL_FILE).write_bytes(b"{}\n")
    else:
        directory.mkdir(parents=True)
        (directory / "shared.safetensors").write_bytes(b"x" * 1000)
        config = json.dumps(CONFIG).encode()
        (directory / "config.json").write_bytes(config)
        files = {"config.json": FileRecord(len(config), "0" * 64)}
        weights = {"shared.safetensors": WeightsRecord(1000, {"x": "0" * 64})}
        write_manifest(directory, Manifest(Source(source, "c" * 40), QUANTIZATION, files, weights))
    return directory


class TestResolve:
    def test_an_alias_is_installed_where_its_repo_is(self):
        for alias, repo in ALIASES.items():
            ref = models.resolve(alias)
            assert (ref.repo, ref.key) == (repo, repo.replace("/", "--"))

    def test_a_model_here_precedes_an_alias_that_is_newer(self, home):
        """Somebody may have installed a model as "8x22b" before that was an alias."""
        keep("8x22b", finished=False)
        assert models.resolve("8x22b") == models.ModelRef("8x22b", "8x22b")
        with pytest.raises(UsageError, match="cannot be a model's name"):
            models.resolve("org/name", key="8x22b")

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("mixtral:8x22b", "8x22b"),
            ("mixtral:text", "base"),
            ("mixtral:8x7b", "instruct"),
            ("qwen3:30b-a3b", "qwen3"),
            ("gpt-oss:20b", "gpt-oss"),
            ("olmoe:1b-7b", "olmoe"),
            ("Qwen3-30B-A3B", "qwen3"),
            ("qwen3.6:35b-a3b", "qwen3.6"),
            ("Qwen3-Coder-Next-80B", "qwen3-coder-next"),
            ("GLM4.7-Flash", "glm-4.7-flash"),
            ("gemma-4:26b", "gemma4"),
            ("lfm2:24b", "lfm2-24b"),
            ("LFM2-8B", "lfm2"),
            ("gpt_oss", "gpt-oss"),
            ("granite-3.1-3b-a800m-instruct", "granite"),
        ],
    )
    def test_the_names_of_other_programs_are_understood(self, name, meant):
        with pytest.raises(ModelNotFoundError) as caught:
            models.resolve(name)
        assert caught.value.hint == f"Did you mean {meant}?"

    @pytest.mark.parametrize(
        "name",
        ["gpt-oss:120b", "qwen3:235b", "qwen3:235b-a22b", "qwen3-coder:480b", "granite3.1-moe:1b"],
    )
    def test_a_known_model_of_another_size_is_not_meant(self, name):
        """A person who asked for a model of 4B was offered one of 61 GB."""
        with pytest.raises(ModelNotFoundError) as caught:
            models.resolve(name)
        assert "ORG/NAME" in (caught.value.hint or "")

    @pytest.mark.parametrize(
        "name",
        [
            *("llama", "llama3", "Llama-3.1-8B", "llama3.2:1b", "codellama:7b", "tinyllama"),
            *("mistral", "mistral 7b", "mistral:7b", "mistral-nemo", "ministral-8b", "phi"),
            *("phi3", "phi-4-mini", "gemma:2b", "gemma2", "gemma3:4b", "gemma-3-27b", "gemma4:e4b"),
            *("qwen2.5:7b", "qwen3:0.6b", "qwen3:4b", "qwen3:8b", "Qwen3-32B", "lfm2:1.2b"),
        ],
    )
    def test_a_dense_model_is_left_to_other_programs(self, name):
        with pytest.raises(ModelNotFoundError, match=r"is a dense model.* ollama or llama\.cpp"):
            models.resolve(name)

    @pytest.mark.parametrize(
        "name", ["llama4", "llama-4-scout", "phi3.5-moe", "qwen2:57b-a14b", "llamb", "philosophy"]
    )
    def test_other_models_are_not_called_dense(self, name):
        with pytest.raises(ModelNotFoundError, match="there is no model"):
            models.resolve(name)

    def test_the_demo(self):
        assert models.resolve("demo") == models.ModelRef("demo", "demo", demo=True)

    @pytest.mark.parametrize(
        "name", ["org/name", "a/b", "O_r-g1/n.a-m_e", "x" * 96 + "/" + "y" * 96]
    )
    def test_a_hub_id(self, name, home):
        ref = models.resolve(name)
        assert (ref.repo, ref.path) == (name, None)
        assert ref.directory.parent == home / "models"

    def test_a_hostile_name_means_nothing(self):
        before = set(Path.cwd().parent.rglob("*"))
        for name in HOSTILE:
            with pytest.raises((ModelNotFoundError, UsageError)) as caught:
                models.resolve(name)
            assert str(caught.value).isprintable()
            assert len(str(caught.value)) < 1000
            assert caught.value.hint
        assert set(Path.cwd().parent.rglob("*")) == before

    def test_what_can_be_named_is_in_the_hint(self):
        with pytest.raises(ModelNotFoundError) as caught:
            models.resolve("nonsense")
        assert all(word in caught.value.hint for word in ("instruct", "base", "demo", "ORG/NAME"))

    @given(st.text(max_size=30) | st.text("abc-./_\n\0 é", max_size=12))
    def test_no_name_leads_out_of_the_data_directory(self, name):
        try:
            ref = models.resolve(name)
        except (ModelNotFoundError, UsageError) as error:
            shown = str(error)
        else:
            shown = ""
            place = ref.directory
            assert place.parent == models.models_dir()
            assert os.path.normpath(place) == str(place)
        assert shown == "" or shown.isprintable()

    @given(st.from_regex(r"[\w.-]{1,12}/[\w.-]{1,12}", fullmatch=True))
    def test_a_name_taken_for_a_hub_id_is_one_by_the_hub_s_own_rules(self, name):
        from huggingface_hub.utils import validate_repo_id

        try:
            ref = models.resolve(name)
        except (ModelNotFoundError, UsageError):
            return
        if ref.path is None:  # "./." is a directory
            assert ref.repo == name
            validate_repo_id(name)

    def test_a_directory_is_installed_under_its_own_name(self):
        own = Path("my-model").absolute()
        own.mkdir()
        for name in ("my-model", "./my-model", str(own)):
            ref = models.resolve(name)
            assert (ref.path, ref.key) == (own, "my-model")
        for name in (".", "../here"):
            ref = models.resolve(name)
            assert (ref.path, ref.key) == (Path.cwd(), "here")

    def test_org_and_name_are_the_hub_s_even_if_there_is_such_a_directory(self):
        Path("org/name").mkdir(parents=True)
        assert models.resolve("org/name").repo == "org/name"
        assert models.resolve("./org/name").path == Path("org/name").absolute()

    @pytest.mark.parametrize("name", ["./nofile.gguf", "nofile.gguf", "/nowhere/model", "../no"])
    def test_a_path_of_nothing_is_said_to_be_no_file(self, name):
        """The hint listed all known models."""
        with pytest.raises(ModelNotFoundError, match="no file or directory") as caught:
            models.resolve(name)
        assert "instruct" not in caught.value.hint

    @pytest.mark.parametrize("name", ["my model", "demo", "org--name"])
    def test_a_directory_whose_name_cannot_be_a_key_needs_another(self, name):
        Path(name).mkdir()
        with pytest.raises(UsageError, match="cannot be a model's name") as caught:
            models.resolve(f"./{name}")
        assert shlex.quote(str(Path(name).absolute())) in caught.value.hint
        assert "--name" in caught.value.hint
        assert models.resolve(f"./{name}", key="mine").key == "mine"

    @pytest.mark.parametrize("key", ["", "a/b", "a--b", "base", ".x"])
    def test_a_key_that_cannot_be(self, key):
        with pytest.raises(UsageError):
            models.resolve("org/name", key=key)

    def test_a_gguf_file_gives_its_name(self):
        for name in ("tiny.Q8_0.gguf", "tiny-00001-of-00003.gguf"):
            Path(name).touch()
            assert models.resolve(f"./{name}").path == Path(name).absolute()
        assert models.resolve("./tiny.Q8_0.gguf").key == "tiny.Q8_0"
        assert models.resolve("tiny-00001-of-00003.gguf").key == "tiny"

    def test_the_keys_that_list_shows_are_names(self):
        keep("org--name")
        keep("mine")
        keep("org--name--Q4_K_M")
        assert models.resolve("org--name").repo == "org/name"
        for name in ("org--name--Q4_K_M", "org/name:Q4_K_M"):
            ref = models.resolve(name)
            assert (ref.repo, ref.key) == ("org/name:Q4_K_M", "org--name--Q4_K_M")
        assert models.resolve("mine") == models.ModelRef("mine", "mine")


class TestFind:
    def test_an_installed_model(self):
        directory = keep("org--name")
        assert (
            models.installed_directory("org/name")
            == models.installed_directory("org--name")
            == directory
        )

    def test_one_that_is_not_here(self):
        with pytest.raises(ModelNotFoundError, match="not on this machine") as caught:
            models.installed_directory("demo")
        assert "mixchat download demo" in caught.value.hint

    def test_an_unfinished_one_says_so(self):
        keep("org--name", finished=False)
        with pytest.raises(ModelNotFoundError, match="unfinished") as caught:
            models.installed_directory("org/name")
        assert "mixchat download org/name" in caught.value.hint


class TestLocate:
    def test_finds_what_is_there_whatever_its_state(self):
        for key, finished in (("org--name", True), ("half", False)):
            directory = keep(key, finished=finished)
            assert models.existing_directory(key) == directory
        assert models.existing_directory("org/name") == models.models_dir() / "org--name"

    def test_one_that_is_not_here(self):
        for name in ("org/name", "demo", "instruct"):
            with pytest.raises(ModelNotFoundError, match="not on this machine"):
                models.existing_directory(name)

    def test_an_installed_model_elsewhere_only_where_it_is_requested(self):
        place = keep("elsewhere").rename(Path.cwd() / "moved")
        assert models.installed_directory("./moved") == place
        with pytest.raises(ModelNotFoundError):
            models.installed_directory("./moved", anywhere=False)

    def test_a_directory_is_not_the_model_that_has_its_name(self):
        """`rm ./half` once meant the installed model `half`."""
        keep("half")
        (Path.cwd() / "half").mkdir()
        with pytest.raises(ModelNotFoundError):
            models.existing_directory("./half")

    def test_one_of_the_two_manifests_makes_it_an_installed_model(self):
        """Without `mixchat.json` it was taken for unfinished: `gc` removed what `repair` mends."""
        directory = keep("good")
        (directory / "mixchat.json").rename(directory / "mixchat.copy.json")
        assert models.installed_directory("good") == directory
        (entry,) = models.list_models()
        assert entry.problem == "damaged"

    def test_a_link_to_a_directory_is_the_link(self, tmp_path):
        keep("good")
        (models.models_dir() / "link").symlink_to(models.models_dir() / "good")
        assert models.existing_directory("link") == models.models_dir() / "link"


class TestList:
    def test_nothing_yet(self, home):
        assert models.list_models() == []
        assert not home.exists()

    def test_the_installed_ones_by_key(self):
        path = keep("org--name")
        keep("demo", source="demo")
        demo, other = models.list_models()
        assert (demo.key, demo.source) == ("demo", "demo")
        size = disk_usage(path)
        assert size > 1000
        commit, weights = "c" * 40, sum(file.stat().st_size for file in path.glob("*.safetensors"))
        assert other == models.ModelEntry(
            "org--name", path, size, "org/name", commit, "nf4", context=128, weights=weights
        )

    @pytest.mark.parametrize(
        ("name", "data"),
        [
            ("config.json", b""),
            ("config.json", b'{"model_type": "llama"}'),
            ("shared.safetensors", b"short"),
        ],
    )
    def test_a_file_of_other_bytes_or_size_is_a_damaged_model(self, name, data):
        (keep("bad") / name).write_bytes(data)
        assert [model.problem for model in models.list_models()] == ["damaged"]

    @pytest.mark.parametrize("manifest", [b"", b"{}", b"[" * 100_000])
    def test_one_damaged_manifest_does_not_hide_the_others(self, manifest):
        keep("good")
        (keep("bad") / "mixchat.json").write_bytes(manifest)
        keep("half", finished=False)
        installed = {model.key: model.problem for model in models.list_models()}
        assert installed == {"bad": "damaged", "good": None, "half": "unfinished"}

    def test_what_is_no_model_is_left_out(self):
        keep("good")
        (models.models_dir() / "a file").write_text("")
        (models.models_dir() / ".good.mixchat.lock").write_text("")
        (models.models_dir() / "a space").mkdir()
        (models.models_dir() / "dangling").symlink_to("nowhere")
        assert [model.key for model in models.list_models()] == ["good"]


def test_names_of_finished_models_are_the_shortest(home):
    assert models.installed_names() == []
    for key in ("mine", "org--tune", "demo", "mistralai--Mixtral-8x7B-Instruct-v0.1"):
        keep(key)
    keep("half", finished=False)
    (models.models_dir() / "a file").write_text("")
    assert models.installed_names() == ["demo", "mine", "instruct", "org--tune"]


def use(key: str, time: int) -> None:
    """Leave what a run of the model leaves."""
    path = report_path_by_key(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time, time))


class TestDefault:
    def test_the_only_installed_model_is_the_default(self):
        """A chat asked for 93 GB, although the demo was installed."""
        keep("half", finished=False)
        (models.models_dir() / "notes").mkdir()
        assert models.default_model() == "half"  # the error says how to resume it
        keep("other", finished=False)
        assert models.default_model() == "instruct"
        keep("mistralai--Mixtral-8x7B-v0.1")
        assert models.default_model() == "base"

    def test_with_several_the_one_used_last_is_the_default(self):
        """With a second model, a chat asked for 93 GB again."""
        for time, key in enumerate(("mine", "demo", "mistralai--Mixtral-8x7B-v0.1"), 1):
            keep(key)
            use(key, time)
        use("removed", 9)
        assert models.default_model() == "base"
        use("demo", 5)
        assert models.default_model() == "demo"

    def test_with_several_and_no_run_one_has_to_be_named(self):
        for number in range(9):
            keep(f"m{number}")
        use("removed", 9)
        with pytest.raises(UsageError) as caught:
            models.default_model()
        hint = caught.value.hint or ""
        assert hint.startswith("Say which: -m m0, -m m1,")
        assert hint.endswith("or -m m7.")
        with pytest.raises(UsageError) as caught:
            models.default_model("")
        assert "Say which: m0, m1," in (caught.value.hint or "")

    def test_with_no_model_the_demo_is_offered_first(self):
        with pytest.raises(ModelNotFoundError) as caught:
            models.installed_directory("instruct")
        hint = caught.value.hint or ""
        assert hint.index("-m demo") < hint.index("mixchat download instruct (93 GB)")

    def test_with_others_those_are_named(self):
        keep("demo")
        keep("mine")
        with pytest.raises(ModelNotFoundError) as caught:
            models.installed_directory("instruct")
        assert "demo, mine" in (caught.value.hint or "")


class TestToRemove:
    @pytest.mark.parametrize(
        ("name", "word"), [("nope", "demo, half"), ("demmo", "Did you mean demo?")]
    )
    def test_an_unknown_name_gets_the_models_that_are_here(self, name, word):
        """Models that nobody had installed were offered for removal."""
        keep("demo")
        keep("half", finished=False)
        with pytest.raises(ModelNotFoundError) as caught:
            models.existing_directory(name)
        assert word in (caught.value.hint or "")
        assert "instruct" not in (caught.value.hint or "")

    def test_a_directory_that_is_no_model_is_not_found(self):
        (models.models_dir() / "notes").mkdir(parents=True)
        with pytest.raises(ModelNotFoundError, match="notes"):
            models.existing_directory("notes")
