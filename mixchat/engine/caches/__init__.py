"""What layers keep of the tokens before.

- layer_cache.py: the contract of a layer's cache
- kv_cache.py: keys and values; paged_cache.py for CPUs, tensor_cache.py by torch, device_cache.py
  for GPUs
- state_cache.py: recurrent states, with checkpoints
- sequence_cache.py: the caches of all layers for one sequence
"""
