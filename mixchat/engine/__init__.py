"""Computes answers, as token ids, with the model, the caches of its layers, and the sampler.

- generate.py: the engine, a loaded model that answers prompts
- answer_request.py: what the answer loop is asked
- batch.py: the answer loop, of one answer or several
- passes.py: one pass through the model, for parts of prompts and next tokens
- chunk_sizer.py: how many tokens of prompts a pass takes
- sampling.py: the next token from the logits
- speculation.py: proposes tokens, to verify several in one pass
- model.py: the transformer, from token ids to logits
- model_tensors.py: the tensors of which it is built
- norm.py: the RMSNorm
- attention.py: attention of a layer
- latent_attention.py: attention to latents, which keys and values would be made of
- delta_net.py, short_conv.py: gated DeltaNets, Mamba2 and short convolutions, which have states
- rope.py: rotary position embedding
- decoder.py: the next token of one sequence, or of each of several, as programs of kernels
- gpu_decoder.py: computes one token on GPUs as CUDA graphs
- gpu_layer.py: the kernels of a layer for these graphs
- moe.py: the router, and the steps of experts
- mlp.py: the dense part of a layer
- layer_cache.py: the contract of what a layer keeps of the tokens of a sequence
- kv_cache.py, paged_cache.py, tensor_cache.py, device_cache.py: keys and values, or latents
- state_cache.py: recurrent states with their checkpoints
- sequence_cache.py: the caches of all layers for a sequence, and the choice of their kinds
- prompt_cache.py: the caches of a sequence in a file
- stats.py: counts of one answer
- report.py: the report of a run's experts
- environment.py: settings that torch reads when it is loaded
"""
