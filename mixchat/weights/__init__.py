"""Downloads, quantizes, stores and repairs the weights of models.

- models.py: the models on this machine, by name
- known_models.py: the models with a short name, whose config.json is in known/
- families/: the families of models, each a description
- matrix/: matrices in 16 bits and in each quantization type
- format/: the format on disk of an installed model
- source/: checkpoints in a directory, on the hub, or built for the demo
- make/: makes an installed model from a checkpoint
- care/: verifies, repairs and removes installed models
"""
