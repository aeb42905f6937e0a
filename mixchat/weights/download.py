"""From a name to a kept model: checks the disk, fetches or builds a checkpoint, quantizes it."""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixchat.config import ModelConfig
from mixchat.errors import ModelNotFoundError, ResourceError, UsageError
from mixchat.progress import Progress
from mixchat.settings import data_dir, format_size
from mixchat.weights import demo, hub, models
from mixchat.weights.manifest import MANIFEST_FILE, Source, check_files, read_manifest
from mixchat.weights.models import ModelRef

if TYPE_CHECKING:
    from mixchat.weights.quantize import QuantizeOptions

Check = Callable[[Path], None]

_BUILD_PREFIX = ".demo-"
_STALE = 3600.0  # seconds after which a build directory belongs to a process that was killed


def download(
    ref: ModelRef,
    options: QuantizeOptions,
    *,
    progress: Progress,
    revision: str | None = None,
    check: Check = lambda checkpoint: None,
) -> Path:
    """Make the model of `ref` a kept one and return its directory; at once if it is one already.

    `check` is shown the checkpoint's directory when its small files are there, before any weight is
    fetched, and may raise. The disk is looked at before that. Whatever goes wrong, Ctrl-C included,
    the unfinished directory is removed; what came from the hub stays in huggingface_hub's cache.
    Raises `ResourceError` where the disk is too small, `UsageError` where another model, or this
    one made otherwise, is kept under the name, and what fetching and quantizing raise.
    """
    if revision is not None and ref.repo is None:
        raise UsageError("--revision goes with a model on the hub", hint="Leave it out.")
    if ref.path is not None and models.is_finished(ref.path):
        return ref.path
    target = models.model_dir(ref)
    with _local_errors(), _only_one(target):
        if models.is_finished(target):
            _check_same(ref, options, target, revision)
            return target
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise UsageError(f"{target} is in the way", hint="Move or remove it.")
        _Job(ref, target, options, progress, revision, check).run()
    return target


@dataclass(frozen=True)
class _Job:
    """One model on its way into `target`."""

    ref: ModelRef
    target: Path
    options: QuantizeOptions
    progress: Progress
    revision: str | None
    check: Check

    def run(self) -> None:
        if self.ref.demo:
            self._demo()
        elif self.ref.path is not None:
            self._local(self.ref.path)
        elif self.ref.repo is not None:
            self._hub(self.ref.repo)
        else:
            raise ModelNotFoundError(
                f"the model {self.ref.key!r} is unfinished",
                hint="Download it again from the directory that it came from.",
            )

    def _demo(self) -> None:
        kept = self._kept_size(ModelConfig.from_dict(demo.CONFIG), demo.BUILD_BYTES)
        _require_disk({data_dir(): kept + demo.BUILD_BYTES})
        _sweep()
        with tempfile.TemporaryDirectory(prefix=_BUILD_PREFIX, dir=data_dir()) as temporary:
            checkpoint = Path(temporary) / "checkpoint"
            demo.build_checkpoint(checkpoint, self.progress)
            self._quantize(checkpoint, Source(models.DEMO))

    def _local(self, checkpoint: Path) -> None:
        config = ModelConfig.from_file(checkpoint / "config.json")
        weights = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        _require_disk({data_dir(): self._kept_size(config, weights)})
        self.check(checkpoint)
        # Looks at every header before it writes, and opens nothing but safetensors.
        self._quantize(checkpoint, Source(str(checkpoint)))

    def _hub(self, repo: str) -> None:
        remote = hub.plan(repo, self.revision)
        _require_disk(
            {
                data_dir(): self._kept_size(remote.config, remote.total),
                hub.cache_dir(): hub.missing_bytes(remote),
            }
        )
        checkpoint = hub.fetch(remote, progress=self.progress, check=self.check)
        self._quantize(checkpoint, Source(repo, remote.commit, self.revision))

    def _kept_size(self, config: ModelConfig, checkpoint_bytes: int) -> int:
        from mixchat.weights import quantize  # imports torch

        kept = quantize.kept_size(config, self.options)
        # Experts that are kept as they are may be fp32, which only the checkpoint's size tells.
        return kept if self.options.quant_type == "nf4" else max(kept, checkpoint_bytes)

    def _quantize(self, checkpoint: Path, source: Source) -> None:
        from mixchat.weights import quantize

        _remove(self.target)  # what an earlier attempt left; only now is it sure to be replaced
        try:
            quantize.quantize_checkpoint(
                checkpoint, self.target, self.options, source=source, progress=self.progress
            )
        except BaseException:
            _remove(self.target)
            raise


def _remove(target: Path) -> None:
    """Remove an unfinished model; first of all what would make it look finished."""
    (target / MANIFEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)


def _check_same(
    ref: ModelRef, options: QuantizeOptions, target: Path, revision: str | None
) -> None:
    """Refuse to pass off one model as another, or a damaged one as whole."""
    manifest = read_manifest(target)
    check_files(target, manifest)
    source, how = manifest.source, manifest.quantization
    wanted = models.DEMO if ref.demo else ref.repo or (str(ref.path) if ref.path else source.repo)
    otherwise = "Remove it first, or keep this one under another name with --name."
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
    if (options.quant_type, options.attention, options.head) != (
        how["quant_type"],
        how["attention"],
        how["head"],
    ):
        raise UsageError(
            f"the model {ref.key!r} is already kept, quantized otherwise", hint=otherwise
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
