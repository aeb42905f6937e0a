"""From a name to a kept model: says what it takes, checks that it fits, builds it, or goes on."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixchat import machine
from mixchat.errors import CheckpointError, ResourceError, UsageError
from mixchat.progress import Progress
from mixchat.settings import data_dir
from mixchat.weights import demo, models
from mixchat.weights.blueprint import Blueprint
from mixchat.weights.build import build, head
from mixchat.weights.hub import cache_dir
from mixchat.weights.hub_origin import SOURCE_DIR
from mixchat.weights.journal import read_head
from mixchat.weights.lock import only_one
from mixchat.weights.manifest import check_files, read_manifest
from mixchat.weights.models import ModelRef
from mixchat.weights.origin import Origin
from mixchat.weights.origins import BUILD_DIR, origin_of, source_of
from mixchat.weights.plan import Plan, kept_size, memory_need, needs, peak_disk, plan_of, with_time
from mixchat.weights.quantize import QuantizeOptions, blueprint_of

Check = Callable[[Path], None]

_IN_THE_WAY = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,  # a link where a file of ours belongs
)


@dataclass(frozen=True)
class Request:
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
    request: Request, progress: Progress, *, announce: Callable[[Plan], None] = lambda plan: None
) -> Path:
    """Make the model a kept one and return its directory; at once if it is one already.

    `announce` is told what it will take before anything is fetched. Where another process makes the
    same model, this one waits for it. What is unfinished stays, also after Ctrl-C, and the next
    call goes on with it; where the checkpoint itself is at fault, it is removed. Raises
    `ResourceError` where disk or memory do not suffice, `UsageError` where another model, or this
    one made otherwise, is kept under the name, and what fetching and quantizing raise.
    """
    if finished := _finished_already(request):
        return finished
    target = models.model_dir(request.ref)

    def wait() -> None:
        progress.note(f"another mixchat is making {request.ref.key}; waiting for it")

    with local_errors(), only_one(target, wait=wait):
        if not _finished_already(request):
            _make(request, target, progress, announce)
    return target


def plan(request: Request, progress: Progress) -> Plan | None:
    """What `download` would take; None where the model is kept already. Fetches no weights."""
    if _finished_already(request):
        return None
    target = models.model_dir(request.ref)
    if request.ref.demo:
        return _demo_plan(request, target)
    source = source_of(request.ref, target, request.revision)
    with origin_of(source, target, progress, keep_source=request.keep_source) as origin:
        blueprint = blueprint_of(origin.index, request.options)
        made = _plan(request, target, origin, blueprint)
        return with_time(made, origin, blueprint, keep=False)


def _finished_already(request: Request) -> Path | None:
    """The model's directory, if it is there and is what was asked for."""
    ref = request.ref
    if request.revision is not None and ref.repo is None:
        raise UsageError("--revision goes with a model on the hub", hint="Leave it out.")
    if ref.path is not None and models.is_finished(ref.path):
        return ref.path
    target = models.model_dir(ref)
    if not models.is_finished(target):
        return None
    _check_same(request, target)
    return target


def _make(
    request: Request, target: Path, progress: Progress, announce: Callable[[Plan], None]
) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} is in the way", hint="Move or remove it.")
    source = source_of(request.ref, target, request.revision)
    if request.ref.demo:  # whose checkpoint has to be built before it can be looked at
        announced = _demo_plan(request, target)
        announce(announced)
        announced.check()
    with origin_of(source, target, progress, keep_source=request.keep_source) as origin:
        blueprint = blueprint_of(origin.index, request.options)
        made = _plan(request, target, origin, blueprint)
        if made.fits:
            request.check(origin.companions())
            _clear(target, origin, blueprint, progress)
            made = with_time(made, origin, blueprint, keep=True)
        if not request.ref.demo:
            announce(made)
        made.check()
        try:
            build(origin, target, blueprint, progress, ahead=made.ahead)
        except CheckpointError:
            shutil.rmtree(target, ignore_errors=True)
            raise
    shutil.rmtree(target / SOURCE_DIR, ignore_errors=True)


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


def _plan(request: Request, target: Path, origin: Origin, blueprint: Blueprint) -> Plan:
    cache = cache_dir() if request.keep_source else None
    return plan_of(request.ref.key, target, origin, blueprint, cache)


def _demo_plan(request: Request, target: Path) -> Plan:
    """The demo's checkpoint is built on this machine: what it will be is known without it."""
    index = demo.expected_index()
    blueprint = blueprint_of(index, request.options)
    peak = peak_disk(index, blueprint, lambda shard: 0) + demo.BUILD_BYTES
    return Plan(
        name=request.ref.key,
        target=target,
        source=models.DEMO,
        commit=None,
        quantization=blueprint.quantization.description(),
        checkpoint=demo.WHEEL_SIZE,
        fetch=demo.WHEEL_SIZE,
        kept=kept_size(blueprint),
        disk=needs((target, max(0, peak - machine.disk_usage(target)))),
        memory=memory_need(index, blueprint),
    )


def _check_same(request: Request, target: Path) -> None:
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
    if revision not in (None, source.revision) and not (source.commit or "").startswith(
        revision or ""
    ):
        raise UsageError(
            f"the model {ref.key!r} is already kept, from revision {source.commit or 'unknown'}",
            hint=otherwise,
        )
    if not _made_as(options, how):
        raise UsageError(
            f"the model {ref.key!r} is already kept, quantized otherwise", hint=otherwise
        )


def _made_as(options: QuantizeOptions, how: dict[str, Any]) -> bool:
    """Whether a model is quantized as asked. Of one that came in 4 bits nothing can be asked."""
    if how["scales"] == "given" and how["quant_type"] != "none":
        return True
    same_scales = how["scales"] == "given" or how["scales"] == options.scales
    kinds = (options.quant_type, options.attention, options.head)
    return same_scales and kinds == (how["quant_type"], how["attention"], how["head"])


@contextmanager
def local_errors() -> Iterator[None]:
    """One line for a full disk or a directory that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk is full: {data_dir()}",
                hint="Free some space, or set MIXCHAT_HOME to a directory on a larger disk. "
                "What is done is kept; the same command goes on there.",
            ) from error
        if error.errno in _IN_THE_WAY:
            raise UsageError(
                f"cannot write {error.filename or data_dir()}: {error.strerror}",
                hint="Set MIXCHAT_HOME to a directory that can be written.",
            ) from error
        raise
