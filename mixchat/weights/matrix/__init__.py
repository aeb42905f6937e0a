"""Stores and multiplies matrices, dense or in codes of 3 to 8 bits.

- linear.py: y = x W^T, the table of types, and the form in which a matrix is stored
- quant_type.py: the bases of quantization types, and the dense one
- nf3.py: 3-bit codes in their two layouts
- nf4.py: 4-bit codes in their two layouts, computed with bitsandbytes
- mxfp4.py: 4-bit codes as published models have them
- int6.py: 5-bit and 6-bit codes in their two layouts
- int8.py: 8-bit codes in their two layouts
- encode.py: from a matrix to codes of levels, fast, or the best of three ways for its inputs
- gptq.py: rounding for the least error of products with given inputs
- bnb_format.py: reads matrices that bitsandbytes has quantized already
- mxfp4_format.py: reads matrices that are published in MXFP4
- gguf_format.py, fp8_format.py: reads matrices of GGUF files, and matrices in FP8
"""
