"""The model: prefill, decode, sampling, and the loader that builds it."""
