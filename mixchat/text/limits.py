"""Limits of a checkpoint's tokenizer and template: memory, time, sizes of files."""

from __future__ import annotations

BYTES = 1_000_000_000  # of address space; a vocabulary of 256,000 takes 650 MB
_SECONDS, _SECONDS_A_BYTE = 2, 2e-6  # a MB of text takes 1 s
_SECONDS_TO_LOAD = 3  # a tokenizer; one with a vocabulary of 256,000 takes 2 s
_PATIENCE = 10  # a busy machine gives a process a tenth of a core, say
TEXT = 2_000_000  # bytes of a request; encoding them takes up to 800 MB

# Bytes of a file. Real chat templates have less than 100 KB, a vocabulary of 256,000 has 33 MB.
TEMPLATE_FILE = 1_000_000
SETTINGS_FILE = 16_000_000
TOKENIZER_FILE = 64_000_000


def seconds(method: str, size: int) -> float:
    """Computing time that a request of `size` bytes may take."""
    least = _SECONDS_TO_LOAD if method == "load_tokenizer" else _SECONDS
    return least + size * _SECONDS_A_BYTE


def patience(seconds: float) -> float:
    """Time until the reply has to be there; it ends what waits instead of computing."""
    return _PATIENCE * seconds
