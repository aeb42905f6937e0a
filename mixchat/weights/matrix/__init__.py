"""Matrices, dense or in codes of 8, 4 or 3 bits: how they are stored and multiplied.

- linear.py: y = x W^T, dense or in codes
- blocks.py: blocks of weights that share a scale
- nf3.py: 3-bit codes in their two layouts
- nf4.py: 4-bit codes in their two layouts, computed with bitsandbytes
- int8.py: 8-bit codes in their two layouts
- encode.py: from a matrix to NF4 or NF3 codes and scales, fast, or the best of three for its inputs
- gptq.py: rounding for the least error of products with given inputs
- bnb_format.py: reads matrices that bitsandbytes has quantized already
"""
