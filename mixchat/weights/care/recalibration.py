"""Makes the experts of an installed model anew from the checkpoint, if it is still the same one.

The manifest has the SHA-256 of each tensor that was read when the model was made. A tensor that is
read again is compared with it: whole files would have to be read for nothing else, 93 GB of
Mixtral. Models of earlier versions have no such SHA-256s. For them each part of an expert is first
made as it is installed, which has to give the installed bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from mixchat.base.errors import UsageError
from mixchat.base.progress import Note
from mixchat.weights.care.repair import made_again
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import read_manifest
from mixchat.weights.make.expert_inputs import ExpertInputs
from mixchat.weights.make.parts import Part, parts
from mixchat.weights.source.checkpoint import Checkpoint, CheckpointReader, other_checkpoint
from mixchat.weights.source.checkpoint_files import CONFIG


class Recalibration:
    """Makes the experts of the layers whose `inputs` are there.

    make: returns the tensors of a part of an expert. With `force`, parts are made although nothing
    shows that the checkpoint is the same. Raises `CheckpointError` where its config differs.
    """

    def __init__(
        self,
        directory: Path,
        checkpoint: Checkpoint,
        reader: CheckpointReader,
        inputs: ExpertInputs,
        make: Callable[[Part], list[torch.Tensor]],
        force: bool,
    ) -> None:
        self._manifest, self._name = read_manifest(directory), directory.name
        self._checkpoint, self.reader, self.inputs = checkpoint, reader, inputs
        self._make, self._force = make, force
        blueprint = installed_blueprint(directory, self._manifest)
        if checkpoint.index.config != blueprint.config:
            raise other_checkpoint(checkpoint, CONFIG, "its values differ")
        self._installed = {part.sources: part for part in parts(blueprint) if part.expert}
        commit = self._manifest.source.commit
        self._is_pinned = commit is not None and commit == checkpoint.source.commit

    def make(self, part: Part) -> list[torch.Tensor]:
        """Return the tensors of an expert's part.

        Raises `CheckpointError` where the checkpoint is another one, `UsageError` where nothing
        shows that it is the same.
        """
        self._check(self._installed[part.sources])
        return self._make(part)

    def check_first(self, note: Note) -> None:
        """Check one part of an expert, before hours of work; the others follow as they are made.

        What the hub has under the model's commit is read once only. Raises as `make` does.
        """
        part = next(iter(self._installed.values()))
        if self._force and not self._is_known(part):
            note("warning: nothing shows that the checkpoint is the one the model was made of")
        self._check(part)
        for name in () if self._is_pinned else part.components(self._checkpoint.index):
            self.reader.read(name)

    def _is_known(self, part: Part) -> bool:
        """Return whether the reader compares the tensors of this part, or the hub's commit does."""
        names = part.components(self._checkpoint.index)
        return self._is_pinned or set(names) <= self._manifest.checkpoint.keys()

    def _check(self, part: Part) -> None:
        """Raise unless the checkpoint is the same, as far as nobody else compares it."""
        assert part.linear is not None
        if self._force or self._is_known(part):
            return
        if part.linear.scales == "calibrated":
            raise UsageError(
                f"an earlier mixchat calibrated {self._name!r} and kept no checksums of "
                f"{self._checkpoint.source.repo}: nothing shows that it is still the same",
                hint="--force takes it as it is.",
            )
        made_again(part, self._manifest, self._checkpoint.index, self.reader.read)
