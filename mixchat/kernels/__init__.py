"""Vector code for CPUs, written in Python and compiled by LLVM where it runs.

- emit.py: a small language for writing vector code in Python
- arithmetic.py: what no single instruction computes
- compile.py: machine code of this CPU
- object_cache.py: the same, cached from run to run
- threads.py: runs it on all cores, with torch's threads
- signature.py: the arguments of a kernel
- four_bit.py: x times a matrix of 4-bit codes
- tile.py: some rows of it with some tokens, in registers
- units.py: the instructions: AVX2, AVX-512, AVX-512 with bytes
- rows.py: norm, rotation, gating, weighted sums: a token's row in one pass
- router.py: the best experts of a token
- pages.py: keys and values in pages
- attention.py: attention over them
- dense.py: x times a matrix that is not quantized, each row of x by itself
"""
