"""Matrices, dense or 4-bit: how they are stored and multiplied.

- linear.py: y = x W^T, dense or 4-bit
- nf4.py: 4-bit codes in their two layouts, computed with bitsandbytes
- encode.py: from a matrix to NF4 codes and scales, fast
- bnb_format.py: reads matrices that bitsandbytes has quantized already
"""
