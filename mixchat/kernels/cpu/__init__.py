"""Vector code for CPUs, written in Python and compiled by LLVM on the machine that runs it.

Codes are quantized weights. Read emit.py first, then units.py, tile.py and quantized_matmul.py.

- emit.py: a small language for writing vector code in Python
- arithmetic.py: functions that no single instruction computes
- compile.py: machine code of this CPU
- object_cache.py: caches machine code from run to run
- threads.py: runs functions on torch's threads
- program.py: the arguments of a kernel, and many kernels in one call
- units.py: turns codes into numbers and multiplies
- four_bit_units.py: the same for codes of 4 bits, MXFP4 among them
- plane_units.py: the same for codes of 5 and 6 bits
- trellis_units.py: the same for the codes of a trellis, of 2 and 3 bits
- trellis_encode.py: the best codes of a trellis for given weights
- tile.py: some rows of a matrix of codes times some tokens
- quantized_matmul.py: x times a matrix of codes
- rows.py: norms, rotary positions, gates and weighted sums of rows
- router.py: the best experts of a token
- arrange.py: slots of a program for the experts that rows have chosen
- pages.py: stores keys and values in pages of memory
- attention.py: attention over these pages
- attend_kernel.py: its main part, scores and weighted values
- latent_kernel.py: the same for latents, which all heads share
- attention_products.py: products of keys and values, with the instructions of each kind of CPU
- convolution.py: short convolutions of each channel
- delta_net.py: the states of gated DeltaNet and Mamba2
- gated_norm.py: the norm after these
- dense.py: x times a dense matrix
"""
