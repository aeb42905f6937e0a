"""Downloads a model. Plans the download, checks that it fits, and builds or resumes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixchat.base.errors import UsageError
from mixchat.base.files import local_error
from mixchat.base.lock import exclusive_lock
from mixchat.base.progress import Progress
from mixchat.base.settings import data_dir
from mixchat.install.make.download_plan import DownloadPlan, estimate_time, make_plan
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.models import ModelRef
from mixchat.install.source.open_checkpoint import open_checkpoint
from mixchat.kernels.cpu.compile import require_kernels
from mixchat.weights.format.journal import Journal
from mixchat.weights.format.manifest import check_files, is_installed, read_manifest
from mixchat.weights.format.own_files import files_in_the_way, foreign_files
from mixchat.weights.format.workspace import settle, workspace
from mixchat.weights.matrix.linear import TYPES, type_of_bits

Check = Callable[[Path], None]
_COMMIT_DIGITS_MIN = 7
_SHOWN_NAMES = 20  # of files, in a message


@dataclass(frozen=True)
class DownloadRequest:
    """The model to download, and the options for it.

    `keep_source` leaves fetched shards in the hub's cache. `check` gets the directory of the small
    files before any weight is fetched, and may raise. With `any_experts` an installed model may
    have experts of other types, because a calibration follows.
    """

    ref: ModelRef
    options: QuantizeOptions
    revision: str | None = None
    keep_source: bool = False
    check: Check | None = None
    any_experts: bool = False


def download(
    request: DownloadRequest,
    progress: Progress,
    *,
    announce: Callable[[DownloadPlan], None] = lambda plan: None,
) -> Path:
    """Install the model and return its directory. Do nothing if it is installed already.

    `announce` is called with the plan before any weight is fetched. The next call resumes
    unfinished work. Raises `ResourceError` if disk or memory do not suffice, `UsageError` if
    another model is installed under the name, `MissingDependencyError` if the CPU is too old.
    """
    if installed := _find_installed(request):
        return installed
    require_kernels()
    target = request.ref.directory

    def wait() -> None:
        progress.note(f"another mixchat is installing {target.name}; waiting for it")

    with local_errors(), exclusive_lock(target, on_wait=wait):
        settle(target)
        if not _find_installed(request):
            _install(request, progress, announce)
    return target


def plan_download(request: DownloadRequest, progress: Progress) -> DownloadPlan | None:
    """Return the plan of `download`, or None if the model is installed."""
    if _find_installed(request):
        return None
    with _open_build(request, progress) as build:
        return estimate_time(make_plan(build), build, keep=False)


def _install(
    request: DownloadRequest, progress: Progress, announce: Callable[[DownloadPlan], None]
) -> None:
    with _open_build(request, progress, check=request.check) as build:
        plan = make_plan(build)
        if plan.fits:
            build.discard_other_work(progress)
            plan = estimate_time(plan, build, keep=True)
        announce(plan)
        plan.check()
        build.ahead = plan.ahead
        build.run(progress)


@contextmanager
def _open_build(
    request: DownloadRequest, progress: Progress, check: Check | None = None
) -> Iterator[CheckpointBuild]:
    target = request.ref.directory
    _check_target(target, progress)
    source = request.ref.find_source(Journal(workspace(target)).source, request.revision)
    with open_checkpoint(
        source, target, progress, keep_source=request.keep_source, check=check
    ) as checkpoint:
        blueprint = make_blueprint(checkpoint.index, request.options)
        yield CheckpointBuild(checkpoint, target, blueprint)


def _check_target(target: Path, progress: Progress) -> None:
    """Note which foreign files stay. Raises `UsageError` if one would be overwritten."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target} is in the way", hint="Move or remove it.")
    if overwritten := files_in_the_way(target):
        raise UsageError(
            f"{target} has files that mixchat did not write and would overwrite: "
            f"{_names(overwritten)}",
            hint="Move them, or install the model under another name with --name.",
        )
    if foreign := foreign_files(target):
        progress.note(f"left in {target}: {_names(foreign)}, which mixchat did not write")


def _names(paths: Sequence[Path]) -> str:
    shown = ", ".join(path.name for path in paths[:_SHOWN_NAMES])
    more = len(paths) - _SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def _find_installed(request: DownloadRequest) -> Path | None:
    """Return the model's directory if it is installed as requested, else None.

    Raises `UsageError` if another model, or this one with other options, has its name.
    """
    ref = request.ref
    if request.revision is not None and ref.repo is None:
        raise UsageError("--revision goes with a model on the hub", hint="Leave it out.")
    if ref.path is not None and is_installed(ref.path):
        if ref.key != ref.path.name:
            raise UsageError(
                f"{ref.path} is an installed model: it cannot be installed under another name",
                hint=f"Run it where it is: mixchat run -m {ref.path}",
            )
        return ref.path
    target = ref.directory
    if not is_installed(target):
        return None
    _check_same(request, target)
    return target


def _check_same(request: DownloadRequest, target: Path) -> None:
    manifest = read_manifest(target)
    check_files(target, manifest)
    source = manifest.source
    key = request.ref.key
    revision = request.revision
    hint = f"Remove it first (mixchat rm {key}), or install this one beside it with --name."
    if source.repo != (request.ref.source_repo or source.repo):
        difference = f"; it came from {source.repo}"
    elif revision not in (None, source.revision) and not (
        len(revision) >= _COMMIT_DIGITS_MIN and (source.commit or "").startswith(revision)
    ):
        difference = f", from revision {source.commit or 'unknown'}"
    elif not _made_as(request, manifest.quantization):
        difference = ", quantized differently"
    else:
        return
    raise UsageError(f"the model {key!r} is already installed{difference}", hint=hint)


def _made_as(request: DownloadRequest, quantization: dict[str, Any]) -> bool:
    """Return whether a model is quantized as requested. Its scales may be any."""
    options = request.options

    def fits(part: str, bits: int | None) -> bool:
        return bits is None or quantization[part] == type_of_bits(bits)

    same_experts = TYPES[options.quant_type].bits == TYPES[quantization["quant_type"]].bits
    same_experts = same_experts or request.any_experts
    return same_experts and fits("attention", options.attention) and fits("head", options.head)


@contextmanager
def local_errors() -> Iterator[None]:
    """Turn the errors of a full disk or a read-only directory into ours."""
    try:
        yield
    except OSError as error:
        if (known := local_error(error, data_dir())) is not None:
            raise known from error
        raise
