"""The model: prefill, decode, sampling.

- generate.py: prefill, decode, and the KV cache reused between turns
- batch.py: several answers at once
- chunk_sizer.py: how many tokens of prompts a pass takes
- passes.py: passes through the model, of one sequence or of several
- cached_prefix.py: the tokens whose keys and values a cache holds
- cache_batch.py: the caches of several sequences
- stats.py: counts of one answer
- sampling.py: the next token from the logits
- speculation.py: proposes tokens, to verify several in one pass
- model.py: norm, attention, block, logits
- decoder.py: the blocks for one token, as programs of kernels
- moe.py: the router
- rope.py: rotary position embedding
- kv_cache.py: keys and values, and what new tokens see of them
- prompt_cache.py: the KV cache in a file, for the next run
- report.py: the report of a run's experts, and the file of it
- environment.py: settings that torch reads when it is loaded
"""
