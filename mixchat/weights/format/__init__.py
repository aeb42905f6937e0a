"""The format on disk of an installed model.

- blueprint.py: the tensors of an installed model, by file
- mixers.py: the tensors of the part of a layer that mixes tokens
- expert.py: the block of an expert, and how it is computed
- gpu_expert.py: the block of an expert, for the kernels of GPUs
- own_files.py: the names by which mixchat knows its own files
- manifest.py: mixchat.json with source, quantization, sizes and SHA-256s
- journal.py: the finished tensors of an unfinished model
- workspace.py: the directory of a new model, which takes the old one's place at the end
- installed_model.py: opens an installed model and rejects what is not exactly one
"""
