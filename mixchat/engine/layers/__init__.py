"""A layer as a description, and what computes it.

- operations.py: the operations, and the rows of buffers that they read and write
- block.py: a whole layer: norms, mixer, router, experts, dense part
- attention.py, latents.py, states.py: the mixers
- rope.py: rotary positions
- model_tensors.py: hands out the tensors
- compute.py: computes operations one after the other, for any rows
- program.py: turns them into a CPU's program for one token of each sequence
- graph.py: turns them into a GPU's kernels for one token
"""
