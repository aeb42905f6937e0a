"""The experts: they are held, moved and computed here.

- keys.py: the name of an expert: (layer, expert)
- placement.py: what fits where
- holder.py: the contract between the model and its experts
- dispatcher.py: sends each layer's rows to those who hold its experts, and combines the outputs
- layer_rows.py: the rows of each expert, and their outputs
- sharing.py: divides the experts, and the work of a layer, among those who can hold them
- cached_experts.py: computes experts on one device
- fetcher.py: brings them into their slots
- cache.py: which expert is in which slot, without a tensor
- policies.py: which one is evicted: the least recently used one
- prefetch.py: predicts which experts the next layers need
- mover.py: loads experts in the background, requested ones first
- store.py: moves bytes into slots, without a policy
- sources.py: the disk, and RAM behind a GPU, as sources of experts
- host_compute.py: experts that the CPU computes sooner than they are copied to the GPU
- memory.py: how much memory is free, while that changes
- trial.py: tries variants of the same work and uses the cheapest
- stats.py: hits, misses, bytes moved, predictions
- workers/: experts on other machines, from both ends of the connection
- recording.py: the inputs of experts, recorded
- trace.py: which experts each token went to, recorded
"""
