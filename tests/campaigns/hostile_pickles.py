"""Pickles planted wherever weights may lie: none is opened, none is fetched, none is run."""

import json
import os
import pickle
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import rig
from counted_hub import Hub
from hostile import Found, judged

PLANTED = (
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json",
    "model.pt", "model.pth", "consolidated.00.pth", "consolidated.00.pt", "last.ckpt",
    "weights.pkl", "weights.pickle", "training_args.bin", "optimizer.bin", "optimizer.pt",
    "scheduler.pt", "rng_state.pth", "adapter_model.bin", "consolidated.safetensors.pkl",
    "tokenizer.pkl", "model.safetensors.bin", "consolidated.00.safetensors",
)  # fmt: skip


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.mark), "w")


def campaign(work: Path, found: Found, options: Namespace) -> None:
    """Beside good weights, instead of them, under their name, and named by the index."""
    mark, opened = work / "mark", work / "opened"
    evil = pickle.dumps(Evil(mark))
    whole = rig.make_checkpoint(work / "whole", 3, 150_000, **rig.TINY)
    hub = Hub(whole)
    home, cache = (Path(os.environ[name]) for name in ("MIXCHAT_HOME", "HF_HOME"))
    index = "model.safetensors.index.json"

    def attempt(label: str, source: Path, planted: str, refused: bool) -> None:
        hub.set(directory=str(source))
        hub.log()
        for where, model in (("here", [str(source), "--name", "x"]), ("on the hub", [rig.REPO])):
            for directory in (home, cache):
                shutil.rmtree(directory, ignore_errors=True)
            opened.write_text("")
            watched = _watched(rig.mixchat("download", *model), planted, opened)
            code = judged(watched, work / "out", f"{label}, {where}", found)
            found.counts[f"{label}, {where}: {'refused' if code else 'left alone'}"] += 1
            if code != (6 if refused else 0):
                found.failures.append(f"{label} {planted}, {where}: exit {code}")
            if mark.exists() or opened.read_text():
                found.failures.append(f"{label} {planted}, {where}: {opened.read_text()} opened")
            if any(entry["name"] == planted for entry in hub.log()) and label != "in disguise":
                found.failures.append(f"{label} {planted}, {where}: fetched")

    try:
        for number, planted in enumerate(PLANTED):
            for label in ("beside weights", "instead of weights", "in the index"):
                source = work / f"{number}-{label}"
                shutil.copytree(whole, source)
                if label == "instead of weights":
                    for path in (*source.glob("*-of-*"), source / index):
                        path.unlink()
                if label == "in the index":
                    raw = json.loads((source / index).read_text())
                    raw["weight_map"]["model.norm.weight"] = planted
                    (source / index).write_text(json.dumps(raw))
                (source / planted).write_bytes(evil)
                attempt(label, source, planted, label != "beside weights")
        source = work / "disguise"
        shutil.copytree(whole, source)
        shard = min(source.glob("*-of-*"))
        shard.write_bytes(evil * 100)
        attempt("in disguise", source, shard.name, refused=True)
        source = work / "tokenizer"
        shutil.copytree(whole, source)
        (source / "tokenizer.model").write_bytes(evil)
        attempt("as tokenizer", source, "tokenizer.pkl", refused=True)
    finally:
        hub.close()


def _watched(work: Callable[[], object], planted: str, opened: Path) -> Callable[[], object]:
    """`work` with an eye on every file that is opened, and on whatever is unpickled."""
    fd = os.open(opened, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    disguised = planted.endswith("-of-00005.safetensors")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        name = str(arguments[0]) if arguments else ""
        if event == "open" and name.endswith("/" + planted) and not disguised:
            os.write(fd, f"{name}\n".encode())
        if event == "pickle.find_class":
            os.write(fd, f"unpickled {arguments}\n".encode())

    def watch() -> object:
        sys.addaudithook(hook)
        return work()

    return watch
