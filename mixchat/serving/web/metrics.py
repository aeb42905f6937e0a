"""Counts for Prometheus, in its text format."""

from __future__ import annotations

from mixchat.serving.service import ServiceStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Name, type, field of the counts, help.
_METRICS = (
    ("requests_running", "gauge", "running", "Answers that are being generated."),
    ("requests_waiting", "gauge", "waiting", "Answers that wait for their turn."),
    ("requests_finished_total", "counter", "finished", "Answers that came to their end."),
    ("requests_cancelled_total", "counter", "cancelled", "Answers whose client left."),
    ("requests_failed_total", "counter", "failed", "Answers that failed."),
    ("prompt_tokens_total", "counter", "prompt_tokens", "Tokens of prompts that were processed."),
    ("cached_tokens_total", "counter", "cached_tokens", "Tokens of prompts that were cached."),
    ("generated_tokens_total", "counter", "generated_tokens", "Tokens of answers."),
    ("busy_seconds_total", "counter", "busy_seconds", "Seconds in which the model computed."),
    ("expert_hits_total", "counter", "expert_hits", "Uses of experts that were in memory."),
    ("expert_misses_total", "counter", "expert_misses", "Uses of experts that were fetched."),
    ("expert_bytes_total", "counter", "bytes_moved", "Bytes of experts that were fetched."),
)


def to_prometheus(stats: ServiceStats) -> str:
    """Return the counts as text."""
    lines = []
    for name, kind, field, about in _METRICS:
        full = f"mixchat_{name}"
        lines += [f"# HELP {full} {about}", f"# TYPE {full} {kind}"]
        lines += [f"{full} {getattr(stats, field)}"]
    return "\n".join(lines) + "\n"
