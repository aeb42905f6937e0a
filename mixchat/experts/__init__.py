"""The experts: what holds, moves and computes them.

- keys.py: the name of an expert: (layer, expert)
- placement.py: what fits where
- runner.py: computes the chosen experts
- fetcher.py: sees to it that they are in their slots
- cache.py: which expert is in which slot, without a tensor
- policies.py: which one goes: LRU, LFU, Belady's
- prefetch.py: predicts which experts the next layers need
- mover.py: brings experts in the background, what is needed first
- store.py: moves bytes into slots, without a policy
- sources.py: where they come from: the disk, RAM behind a GPU
- host_compute.py: what is sooner computed on the CPU than copied to the GPU
- memory.py: how much memory is free, while that changes
- trial.py: tries ways to do a thing and keeps to the cheapest
- stats.py: hits, misses, bytes moved
- trace.py: which experts each token went to, recorded
"""
