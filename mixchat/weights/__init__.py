"""Weights at rest, with download, quantization, the format on disk, and repair.

- models.py: the models on this machine, by name
- known_models.py: the models with a short name
- families/: the families of models, each a description
- matrix/: a matrix, dense or 4-bit, stored and computed
- format/: the format on disk of an installed model
- source/: checkpoints in a directory, on the hub, or built for the demo
- make/: from a checkpoint to an installed model
- care/: verify, repair, convert, remove
"""
