"""Kernels for GPUs in Triton, which PyTorch's wheels for CUDA and ROCm bring.

Import these modules only if a GPU computes: all but toolchain.py and splits.py
import Triton at once.

- toolchain.py: finds what Triton needs on this machine
- launch.py: starts every kernel
- norm.py: adds a part's output to the hidden states, and normalizes them
- heads.py: sums queries, keys and values of one token, normalizes and rotates them
- kv_store.py: stores keys and values in the memory of a KV cache
- splits.py: the scratch of a token's attention
- attention.py: attention of new tokens, one or many, over a KV cache
- convolution.py: a short convolution for one token
- dense.py: one row times a matrix of few rows that is not quantized
- delta_net.py: a Gated DeltaNet, between its two products
- latents.py: queries, the latent and the key of one token, for latent attention
- codes.py: turns codes of each type into numbers
- product.py: a few rows times a matrix
- route.py: the best experts of a token
- experts.py: the chosen experts of a token, found by their addresses
- dequantize.py: codes to dense rows, for products with many rows
"""
