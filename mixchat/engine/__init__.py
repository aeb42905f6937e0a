"""Computes answers, as token ids, with the model, the caches of its layers, and the sampler.

- generate.py: the engine, a loaded model that answers prompts
- answer.py: an answer in token ids, from its request to its end
- batch.py: the answer loop, of one answer or several
- passes.py: one pass through the model, for parts of prompts and next tokens
- chunk_sizer.py: how many tokens of prompts a pass takes
- sampling.py: the next token from the logits
- speculation.py: proposes tokens, to verify several in one pass
- model.py: the transformer, from token ids to logits
- layers/: layers as descriptions, and their executors
- decoder.py: the next token of one sequence, or of each of several, as a CPU's programs
- gpu_decoder.py: computes one token on GPUs as CUDA graphs
- caches/: what layers keep of the tokens before
- prompt_cache.py: the caches of a sequence in a file
- stats.py: counts of one answer
- report.py: the report of a run's experts
- environment.py: settings that torch reads when it is loaded
"""
