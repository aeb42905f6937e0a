"""Stores and multiplies matrices, dense or in codes of 2 to 8 bits.

In a trellis, a code of 2 or 3 bits, a number depends on the bits of several rows.

- linear.py: y = x W^T, the table of types, and the form in which a matrix is stored
- quant_type.py: the bases of quantization types, and the dense one
- trellis.py: a trellis as a quantization type, its scales and its order
- trellis_table.py: the numbers of a trellis
- nf4.py: 4-bit codes, whose levels are bitsandbytes' NF4
- mxfp4.py: 4-bit codes as published models have them
- int6.py: 6-bit codes
- int8.py: 8-bit codes
- encode.py: from a matrix to codes of levels, fast, or the best of three ways for its inputs
- gptq.py: rounding for the least error of products with given inputs
- gpu_linear.py: y = x W^T on a GPU
- on_device.py: builds a matrix for a CPU or a GPU
- bnb_format.py: reads matrices that bitsandbytes has quantized already
- mxfp4_format.py: reads matrices that are published in MXFP4
- gguf_format.py, fp8_format.py: reads matrices of GGUF files, and matrices in FP8
"""
