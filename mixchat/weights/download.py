"""From a name to a kept model: checks the disk, fetches or builds a checkpoint, quantizes it."""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mixchat.config import ModelConfig
from mixchat.errors import ModelNotFoundError, ResourceError, UsageError
from mixchat.progress import Progress
from mixchat.settings import data_dir, format_size
from mixchat.weights import demo, hub, models
from mixchat.weights.manifest import Source, read_manifest
from mixchat.weights.models import ModelRef

if TYPE_CHECKING:
    from mixchat.weights.quantize import QuantizeOptions

_BUILD_PREFIX = ".demo-"
_STALE = 24 * 3600.0  # seconds after which a build directory belongs to a process that was killed


def download(
    ref: ModelRef, options: QuantizeOptions, *, progress: Progress, revision: str | None = None
) -> Path:
    """Make the model of `ref` a kept one and return its directory; at once if it is one already.

    The disk is checked before the first weight is fetched. Whatever goes wrong, Ctrl-C included,
    the unfinished directory is removed; what came from the hub stays in huggingface_hub's cache.
    Raises `ResourceError` where the disk is too small, and what fetching and quantizing raise.
    """
    if ref.path is not None and models.is_finished(ref.path):
        return ref.path
    target = models.model_dir(ref)
    with _local_errors(), _only_one(target):
        if models.is_finished(target):
            _check_same(ref, target, revision)
            return target
        if target.exists():
            shutil.rmtree(target)
        try:
            _make(ref, target, options, progress, revision)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise
    return target


def _make(
    ref: ModelRef, target: Path, options: QuantizeOptions, progress: Progress, revision: str | None
) -> None:
    if ref.demo:
        _make_demo(target, options, progress)
    elif ref.path is not None:
        _make_local(ref.path, target, options, progress)
    elif ref.repo is not None:
        _make_from_hub(ref.repo, target, options, progress, revision)
    else:
        raise ModelNotFoundError(
            f"the model {ref.key!r} is unfinished",
            hint="Download it again from the directory that it came from.",
        )


def _make_demo(target: Path, options: QuantizeOptions, progress: Progress) -> None:
    config = ModelConfig.from_dict(demo.CONFIG)
    _require_disk({data_dir(): _kept_size(config, options) + demo.BUILD_BYTES})
    _sweep()
    with tempfile.TemporaryDirectory(prefix=_BUILD_PREFIX, dir=data_dir()) as temporary:
        checkpoint = Path(temporary) / "checkpoint"
        demo.build_checkpoint(checkpoint, progress)
        _quantize(checkpoint, target, options, models.DEMO, None, progress)


def _make_local(
    checkpoint: Path, target: Path, options: QuantizeOptions, progress: Progress
) -> None:
    # quantize_checkpoint looks at every header before it writes, and opens nothing but safetensors.
    config = ModelConfig.from_file(checkpoint / "config.json")
    _require_disk({data_dir(): _kept_size(config, options)})
    _quantize(checkpoint, target, options, str(checkpoint), None, progress)


def _make_from_hub(
    repo: str, target: Path, options: QuantizeOptions, progress: Progress, revision: str | None
) -> None:
    remote = hub.plan(repo, revision)
    _require_disk(
        {
            data_dir(): _kept_size(remote.config, options),
            hub.cache_dir(): hub.missing_bytes(remote),
        }
    )
    checkpoint = hub.fetch(remote, progress=progress)
    _quantize(checkpoint, target, options, repo, remote.commit, progress)


def _kept_size(config: ModelConfig, options: QuantizeOptions) -> int:
    from mixchat.weights import quantize  # imports torch

    return quantize.kept_size(config, options)


def _quantize(
    checkpoint: Path,
    target: Path,
    options: QuantizeOptions,
    repo: str,
    commit: str | None,
    progress: Progress,
) -> None:
    from mixchat.weights import quantize

    source = Source(repo, commit)
    quantize.quantize_checkpoint(checkpoint, target, options, source=source, progress=progress)


def _check_same(ref: ModelRef, target: Path, revision: str | None) -> None:
    """Refuse to pass off one model as another that would be kept under the same name."""
    source = read_manifest(target).source
    wanted = models.DEMO if ref.demo else ref.repo or (str(ref.path) if ref.path else source.repo)
    if source.repo != wanted:
        raise UsageError(
            f"a model named {ref.key!r} is already kept; it came from {source.repo}",
            hint="Give this one another name with --name, or remove that one first.",
        )
    if revision is not None and not (source.commit or "").startswith(revision):
        raise UsageError(
            f"the model {ref.key!r} is already kept, from revision {source.commit or 'unknown'}",
            hint="Remove it first, or keep this one under another name with --name.",
        )


def _require_disk(needs: Mapping[Path, int]) -> None:
    """Check the free bytes of each disk. Raises `ResourceError` with what is needed and there."""
    disks: dict[int, tuple[Path, int]] = {}
    for directory, size in needs.items():
        place = next(p for p in (directory, *directory.parents) if p.exists())
        first, total = disks.get(place.stat().st_dev, (place, 0))
        disks[place.stat().st_dev] = (first, total + size)
    for place, needed in disks.values():
        free = shutil.disk_usage(place).free
        if needed > free:
            raise ResourceError(
                f"not enough disk in {place}: {format_size(needed)} needed, "
                f"{format_size(free)} free",
                hint="Free some space, or set MIXCHAT_HOME (models) or HF_HOME (what is fetched) "
                "to a directory on a larger disk.",
            )


@contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Hold the right to write `target`. Raises `UsageError` where another process has it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # not a POSIX system: no lock
            pass
        except BlockingIOError:
            raise UsageError(
                f"another mixchat is making the model {target.name!r}",
                hint="Wait until it has finished.",
            ) from None
        yield


@contextmanager
def _local_errors() -> Iterator[None]:
    """One line for a full disk or a directory that cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk is full: {data_dir()}",
                hint="Free some space, or set MIXCHAT_HOME to a directory on a larger disk.",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UsageError(
                f"cannot write {error.filename or data_dir()}: {error.strerror}",
                hint="Set MIXCHAT_HOME to a directory that can be written.",
            ) from error
        raise


def _sweep() -> None:
    """Remove the build directories that killed processes left behind."""
    for path in data_dir().glob(_BUILD_PREFIX + "*"):
        try:
            if path.stat().st_mtime < time.time() - _STALE:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:
            continue
