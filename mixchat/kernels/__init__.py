"""Vector code for CPUs, written in Python and compiled by LLVM on the machine that runs it.

Read emit.py first, then units.py, tile.py and quantized_matmul.py. They go from single instructions
to a product.

- emit.py: a small language for writing vector code in Python
- arithmetic.py: functions of numbers that no single instruction computes
- compile.py: compiles it to machine code of this CPU
- object_cache.py: caches machine code from run to run
- threads.py: runs it on several cores, with torch's threads
- program.py: the arguments of a kernel, and many kernels in one call, without Python between
- units.py: turns codes into numbers and multiplies: AVX2, AVX-512, AVX-512 with bytes
- tile.py: some rows of a matrix of codes times some tokens, in registers
- quantized_matmul.py: x times a matrix of codes of 3, 4 or 8 bits
- rows.py: norm, rotation, gating, weighted sums: a token's row in one pass
- router.py: the best experts of a token
- pages.py: keys and values in pages
- attention.py: attention over these pages
- dense.py: x times a dense matrix, each row of x by itself
"""
