"""Downloads, quantizes, repairs and removes models. Nothing that computes imports it.

- models.py: the models on this machine, by name
- known_models.py: the models with a short name, whose config.json is in known/
- source/: checkpoints in a directory, on the hub, or built for the demo
- make/: makes an installed model from a checkpoint
- care/: verifies, repairs and removes installed models
"""
