"""Native code that computes with quantized weights.

- cpu/: vector code for CPUs, compiled by LLVM where it runs
- gpu/: kernels for GPUs, in Triton
"""
