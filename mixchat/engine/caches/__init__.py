"""What layers keep of the tokens before.

- layer_cache.py: the contract of a layer's cache
- kv_cache.py: keys and values
- paged_cache.py, tensor_cache.py, device_cache.py: these for CPUs, by torch, and for GPUs
- state_cache.py: recurrent states, with checkpoints
- checkpoints.py: the choice of checkpoints that stay
- sequence_cache.py: the caches of all layers for one sequence
"""
