"""Limits of a checkpoint's tokenizer and template: memory, time, sizes of files."""

from __future__ import annotations

MAX_MEMORY = 1_000_000_000  # bytes of address space; a vocabulary of 256,000 takes 650 MB
MAX_REQUEST = 2_000_000  # bytes of a request; encoding them takes up to 800 MB

# Bytes of a file. Real chat templates have less than 100 KB, a vocabulary of 256,000 has 33 MB.
MAX_TEMPLATE_FILE = 1_000_000
MAX_SETTINGS_FILE = 16_000_000
MAX_TOKENIZER_FILE = 64_000_000

_SECONDS, _SECONDS_PER_BYTE = 2, 2e-6  # a MB of text takes 1 s
_SECONDS_OF_VOCABULARY = 3  # loading one of 256,000 tokens takes 2 s
_BUSY = 10  # a busy machine may give a process a tenth of a core


def cpu_seconds(method: str, size: int) -> float:
    """Return the computing time that a request of `size` bytes may take."""
    whole = method in ("load_tokenizer", "token_bytes")
    least = _SECONDS_OF_VOCABULARY if whole else _SECONDS
    return least + size * _SECONDS_PER_BYTE


def reply_seconds(cpu_seconds: float) -> float:
    """Return the time until the reply must arrive; it ends a child that waits, not computes."""
    return _BUSY * cpu_seconds
