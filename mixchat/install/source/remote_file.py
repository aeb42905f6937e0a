"""A file of a commit on the hub, and its path in huggingface_hub's cache.

huggingface_hub tells which files the cache has. It has no public function that adds a fetched file.
`hf_hub_download` would ask the hub for each file again, and fetch it if the hub names another hash.
So `keep` adds files to the cache, as its documentation describes it.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from mixchat.install.source.checkpoint_index import CONFIG
from mixchat.install.source.hub_errors import endpoint


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit on the hub."""

    repo_id: str
    commit: str
    path: str
    size: int  # bytes
    sha256: str | None  # of a large file (LFS)
    git_sha1: str | None  # git's hash of a small one

    @property
    def name(self) -> str:
        """Return its name without the folder."""
        return self.path.rpartition("/")[2]

    @property
    def where(self) -> str:
        return f"{self.repo_id}: {self.path}"

    @property
    def url(self) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo_id, self.path, revision=self.commit, endpoint=endpoint())

    def cached(self) -> Path | None:
        """Return the file in the cache, None if it is not there. Its bytes may be damaged.

        The file may belong to another commit, too. A cache without links tells files by their
        sizes.
        """
        from huggingface_hub import try_to_load_from_cache

        blob = self._blob()
        path = try_to_load_from_cache(self.repo_id, self.path, revision=self.commit)
        if isinstance(path, str):
            real = Path(path).resolve()
            is_copy = real.parent.name != blob.parent.name and real.stat().st_size == self.size
            if is_copy or real == blob.resolve():
                return Path(path)
        return blob if blob.is_file() else None

    def keep(self, path: Path, revision: str | None) -> Path:
        """Move a file with the right bytes into the cache, or link it there. Return its path.

        `revision` is the branch or tag that stood for the commit. The cache notes it.
        """
        blob = self._blob()
        pointer = self._pointer()
        if path not in (blob, pointer):
            _move(path, blob)
        if not pointer.exists():
            pointer.parent.mkdir(parents=True, exist_ok=True)
            pointer.unlink(missing_ok=True)
            try:
                pointer.symlink_to(os.path.relpath(blob, pointer.parent))
            except FileExistsError:
                pass  # another download has made it
            except OSError:  # exFAT has no links, so huggingface_hub puts the file there
                os.replace(blob, pointer)
        _write_ref(self.repo_id, revision, self.commit)
        return blob if blob.exists() and not pointer.samefile(blob) else pointer

    def _blob(self) -> Path:
        """Return the path by the file's hash, or the pointer for a file without a hash."""
        name = self.sha256 or self.git_sha1
        return _repo_dir(self.repo_id) / "blobs" / name if name else self._pointer()

    def _pointer(self) -> Path:
        """Return the path of the link to the blob."""
        return _repo_dir(self.repo_id) / "snapshots" / self.commit / self.path


def cache_dir() -> Path:
    """Return huggingface_hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def cached_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """Return the directory with the cached files of a branch, tag or commit, without the hub.

    Some files may be missing. The directory's name is the commit.
    """
    from huggingface_hub import snapshot_download

    try:
        # It looks for one file only, because a person may have fetched one format of several.
        path = snapshot_download(
            repo_id, revision=revision, local_files_only=True, allow_patterns=CONFIG
        )
    except (OSError, ValueError):
        return None
    return Path(path)


def _repo_dir(repo_id: str) -> Path:
    from huggingface_hub.file_download import repo_folder_name

    return cache_dir() / repo_folder_name(repo_id=repo_id, repo_type="model")


def _move(path: Path, target: Path) -> None:
    """Move a file, maybe to another disk. A target that is there is replaced at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # huggingface_hub removes such files if a killed process leaves them.
    copy = target.with_name(f"{target.name}.{uuid4().hex}.incomplete")
    try:
        shutil.move(path, copy)
        os.replace(copy, target)
    finally:
        copy.unlink(missing_ok=True)


def _write_ref(repo_id: str, revision: str | None, commit: str) -> None:
    """Note the commit of a branch or tag, so that it can be found without the hub."""
    from huggingface_hub import constants

    refs = _repo_dir(repo_id) / "refs"
    ref = refs / (revision or constants.DEFAULT_REVISION)
    if ref.name != commit and ref.resolve().is_relative_to(refs.resolve()):
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
