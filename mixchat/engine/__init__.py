"""The model: prefill, decode, sampling, planning, and the loader that builds it.

- loader.py: builds everything out of everything else
- tiers.py: builds what holds, moves and computes the experts
- fitting.py: what a model asks of memory, for planning and for loading
- planning.py: what a model will do on this machine
- expectation.py: how fast it will be
- threads.py: how many threads compute
- speeds.py, probe.py: how fast this machine is, measured once
- generate.py: prefill, decode, and the KV cache reused between turns
- sampling.py: the next token from the logits
- model.py: norm, attention, block, logits
- moe.py: the router
- rope.py: rotary position embedding
- kv_cache.py: keys and values, and what new tokens see of them
- prompt_cache.py: the KV cache in a file, for the next run
- environment.py: what torch has to be told before it is loaded
"""
