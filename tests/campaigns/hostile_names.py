"""Hostile names in every place that takes one, and links planted where mixchat writes."""

import hashlib
import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rig
from counted_hub import Hub
from hostile import Found, judged, surroundings

COMMIT = "c0ffee" * 6 + "abcd"
LONG = "a" * 5000
EVIL = ("..", "../evil", "a\0b", "C:evil", "evil\n", ".git", ".git/config", "a\\..\\b", LONG)
EVIL += ("\u202eevil", "\uff0e\uff0e/evil", "\ud800", "/{outside}/evil", "a/../../evil", "CON", "")

Case = tuple[str, Callable[[], object], list[list[str]]]


def campaign(work: Path, found: Found, options: Namespace) -> None:
    """Run every case in a fresh home; the surroundings must stay as they are."""
    outside = work / "outside"
    outside.mkdir()
    (outside / "a directory").mkdir()
    source = rig.make_checkpoint(work / "source", 1, 150_000, **rig.TINY)
    hub = Hub(source)
    home, cache = (Path(os.environ[name]) for name in ("MIXCHAT_HOME", "HF_HOME"))
    os.chdir(outside)
    try:
        for label, prepare, commands in _cases(work, source, outside, hub, home, cache):
            if options.only not in label:
                continue
            for directory in (home, cache):
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
            hub.set(directory=str(source), listing={}, siblings=[])
            (outside / "precious").write_text("precious")
            (outside / "absent").unlink(missing_ok=True)
            prepare()
            before = surroundings(work)
            codes = []
            for arguments in commands:
                codes.append(judged(rig.mixchat(*arguments), home.parent / "out", label, found))
            kind = "refused" if any(codes) else "harmless"
            found.counts[f"{label.split(':')[0]}: {kind}"] += 1
            if changed := set(before.items()) ^ set(surroundings(work).items()):
                found.failures.append(f"{label}: changed outside: {sorted(changed)[:3]}")
    finally:
        hub.close()
        os.chdir(home.parent)


def _cases(
    work: Path, source: Path, outside: Path, hub: Hub, home: Path, cache: Path
) -> Iterator[Case]:
    download = [["download", rig.REPO]]
    evil = [name.replace("/{outside}", str(outside)) for name in EVIL]
    for name in evil:
        yield f"model: {name!r:.40}", _nothing, [["download", name]]
        yield f"ORG/model: {name!r:.40}", _nothing, [["download", f"org/{name}"]]
        yield f"--name: {name!r:.40}", _nothing, [["download", str(source), "--name", name]]
        yield f"--revision: {name!r:.40}", _nothing, [[*download[0], "--revision", name]]
        yield f"rm, verify: {name!r:.40}", _nothing, [["rm", "-y", name], ["verify", name]]
    for name in (*evil, None, 5, ["x"]):
        sibling = {"rfilename": name, "size": 5, "blobId": "0" * 40}
        yield f"listing: {name!r:.40}", lambda s=sibling: hub.set(siblings=[s]), download
        yield f"commit: {name!r:.40}", lambda n=name: hub.set(listing={"sha": n}), download
        shard = f"{name}.safetensors" if isinstance(name, str) else name
        local = work / f"map{abs(hash(str(name)))}"
        _index(source, local, shard)
        yield f"index: {name!r:.40}", _nothing, [["download", str(local), "--name", "x"]]
        served = lambda d=local: hub.set(directory=str(d))  # noqa: E731
        yield f"index on the hub: {name!r:.40}", served, download
    for key, value in _configs():
        local = work / f"config{abs(hash((key, str(value))))}"
        shutil.copytree(source, local)
        config = json.loads((source / "config.json").read_text()) | {key: value}
        (local / "config.json").write_text(json.dumps(config))
        command = [["download", str(local), "--name", "x"]]
        yield f"config.json: {key} {value!r:.30}", _nothing, command
    installed = work / "installed"
    judged(rig.mixchat("download", str(source), "--name", "tiny"), work / "o", "install", Found())
    shutil.move(home / "models/tiny", installed)
    whole = [["verify", "tiny"], ["show", "tiny"], ["list"], ["repair", "tiny"]]
    for name in evil:
        for part in ("files", "weights"):
            manifest = lambda n=name, p=part: _manifest(installed, home, n, p)  # noqa: E731
            yield f"manifest: {part} {name!r:.40}", manifest, [*whole, ["rm", "-y", "tiny"]]
        for key in ("repo", "commit", "revision", "file"):
            journal = lambda n=name, k=key: _journal(home, k, n)  # noqa: E731
            yield f"journal: {key} {name!r:.40}", journal, download
    for key, value in (("repo", 5), ("commit", []), ("commit", {}), ("revision", 5), ("sha", 5)):
        yield f"journal: {key} {value}", lambda k=key, v=value: _journal(home, k, v), download
    nested = "[" * 100_000
    yield "journal: nested", lambda: _journal(home, "line", nested), download
    model, repo = home / "models" / rig.KEY, cache / "hub/models--org--tiny-mixtral"
    shard = min(source.glob("*-of-*")).name
    places = [model, home / f"models/.{rig.KEY}.mixchat.lock"]
    unfinished = home.parent / rig.WORKSPACE
    names = ("source", "inputs", "old", "model", "spill-x", "journal.jsonl", "model/config.json")
    places += [unfinished, *(unfinished / name for name in names)]
    places += [model / "shared.safetensors", model / "mixchat.json.mixchat.tmp"]
    places += [unfinished / "source" / name for name in (shard, f"{shard}.mixchat.part")]
    places += [repo / f"snapshots/{COMMIT}/{name}" for name in ("config.json", shard)]
    blob = hashlib.sha256((source / shard).read_bytes()).hexdigest()
    places += [repo / "blobs" / name for name in (blob, f"{blob}.mixchat.part")]
    for place in places:
        extra = ["--keep-source"] if place.is_relative_to(cache) else []
        for goal in ("a directory", "precious", "absent"):
            link = lambda p=place, g=goal: _link(p, outside / g)  # noqa: E731
            label = f"link: {place.relative_to(home.parent)} to {goal}"
            yield label, link, [[*download[0], *extra], ["gc", "--unfinished"]]
    # Whole directories elsewhere are a person's own arrangement: followed, and nothing else harmed.
    for place in (home / "models", repo, repo / "blobs", repo / f"snapshots/{COMMIT}"):
        elsewhere = lambda p=place: _link(p, _fresh(home.parent / "elsewhere"))  # noqa: E731
        label = f"own arrangement: {place.relative_to(home.parent)}"
        yield label, elsewhere, [[*download[0], "--keep-source"], ["gc", "--unfinished"]]


def _fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


def _nothing() -> None:
    pass


def _index(source: Path, local: Path, shard: Any) -> None:
    shutil.copytree(source, local)
    path = local / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = shard
    path.write_text(json.dumps(index))


def _configs() -> Iterator[tuple[str, Any]]:
    for value in (LONG, "a\nb", ["x" * 1000], {"a": LONG}):
        yield from ((key, value) for key in ("model_type", "hidden_act", "rope_parameters"))
        yield from ((key, value) for key in ("vocab_size", "eos_token_id", "tie_word_embeddings"))
    for value in (2**31 - 1, 10**400, -1, 0, 1e308):
        yield from ((key, value) for key in ("num_hidden_layers", "num_local_experts"))
        yield from ((key, value) for key in ("hidden_size", "vocab_size", "rms_norm_eps"))
    yield "auto_map", {"AutoModel": "evil.Evil"}
    yield "_name_or_path", "../../evil"


def _manifest(installed: Path, home: Path, name: str, part: str) -> None:
    """Write a model whose manifest, with its right digest, lists another file."""
    model = home / "models/tiny"
    shutil.copytree(installed, model)
    raw = json.loads((model / "mixchat.json").read_text())
    raw.pop("sha256")
    raw[part][name] = {"size": 5, "sha256": "0" * 64 if part == "files" else {}}
    canonical = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    raw["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    for manifest in ("mixchat.json", "mixchat.copy.json"):
        (model / manifest).write_text(json.dumps(raw, indent=1) + "\n")


def _journal(home: Path, key: str, value: Any) -> None:
    """An unfinished model whose journal holds something hostile."""
    place = home.parent / rig.WORKSPACE
    place.mkdir(parents=True)
    source = {"repo": rig.REPO, "commit": COMMIT, "revision": None}
    how = {"quant_type": "nf4", "blocksize": 64, "scales": "absmax"}
    how |= {"attention": "int8", "head": "int8", "dtype": "bfloat16"}
    head = {"format": 3, "source": source, "quantization": how, "fingerprint": COMMIT}
    line = {"file": "shared.safetensors", "sha256": {"model.norm.weight": "0" * 64}}
    if key in source:
        source[key] = value
    elif key in ("file", "sha"):
        line["file" if key == "file" else "sha256"] = value
    lines = [json.dumps(head), value if key == "line" else json.dumps(line)]
    (place / "journal.jsonl").write_text("\n".join(lines) + "\n")


def _link(place: Path, goal: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(goal)
