"""The families of models that run. Each describes its config.json and its checkpoint's tensors.

- read_config.py: finds the family of a config.json, and reads it
- family.py: the form of a description, and the tensors that families have in common
- gguf.py, gguf_config.py: llama.cpp's names for the tensors and the keys of a config.json
- gguf_mixers.py: mixers whose rows and columns llama.cpp's converter has moved
- config_keys.py: reads and checks single keys of a config.json
- mixtral.py, qwen3_moe.py, mellum.py, olmoe.py, granitemoe.py, gpt_oss.py: a family each
- minimax_m2.py: a family, with a correction of its router's choice
- qwen3_next.py, qwen3_5_moe.py: families with gated DeltaNets and attention
- granitemoehybrid.py: a family with Mamba2 and attention
- lfm2_moe.py: a family with short convolutions and attention
- gemma4.py: a family, with a dense part and norms of each part's output
- qwen2_moe.py, ernie4_5_moe.py, dots1.py, glm4_moe.py: a family each, with dense parts
- glm4_moe_lite.py, deepseek_v2.py, deepseek_v3.py, mistral4.py: families with latent attention
"""
