"""Manifests of the format before today's."""

import json
from pathlib import Path

from mixchat.weights.format import manifest
from mixchat.weights.format.manifest import MANIFEST_FILE, MANIFESTS


def as_format_3(installed: Path) -> None:
    """Write the manifest in format 3, which has no SHA-256s of the checkpoint."""
    document = json.loads((installed / MANIFEST_FILE).read_text())
    del document["sha256"], document["checkpoint"]
    for record in document["weights"].values():
        del record["unlike"]
    document["format"] = 3
    document["sha256"] = manifest._digest(document)
    for name in MANIFESTS:
        (installed / name).write_text(json.dumps(document, indent=1) + "\n")
