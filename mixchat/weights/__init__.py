"""Weights at rest: fetching, quantizing, the format on disk."""
