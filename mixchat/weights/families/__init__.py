"""The families of models that run. Each describes its config.json and its checkpoint's tensors.

- read_config.py: finds the family of a config.json, and reads it
- family.py: the form of a description, and the tensors that families have in common
- gguf.py, gguf_config.py: llama.cpp's names for the tensors and the keys of a config.json
- config_keys.py: reads and checks single keys of a config.json
- mistral.py, qwen.py, deepseek.py, glm.py, granite.py: the families of a maker of several
- ernie4_5_moe.py, dots1.py, gemma4.py, gpt_oss.py, laguna.py: a family each
- lfm2_moe.py, mellum.py, minimax_m2.py, olmoe.py: a family each
"""
