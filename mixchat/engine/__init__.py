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
- model.py: norm, block, logits
- attention.py: attention of a layer, and rotary position embedding
- decoder.py: the blocks for one token, as programs of kernels
- moe.py: the router, and the steps of experts
- kv_cache.py: keys and values, and what new tokens see of them
- prompt_cache.py: the KV cache in a file, for the next run
- report.py, report_path.py: what a run did with its experts, and the file of it
- environment.py: settings that torch reads when it is loaded
"""
