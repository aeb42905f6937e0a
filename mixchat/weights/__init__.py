"""Weights at rest: download, quantization, the format on disk, repair.

- models.py: the models on this machine, by name
- matrix/: a matrix, dense or 4-bit: stored and computed
- format/: the format on disk of an installed model
- source/: where a checkpoint comes from: a directory, the hub, the demo
- make/: from a checkpoint to an installed model
- care/: verify, repair, convert, remove
"""
