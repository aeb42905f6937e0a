"""Matrices, dense or in codes of 8 or 4 bits: how they are stored and multiplied.

- linear.py: y = x W^T, dense or in codes
- nf4.py: 4-bit codes in their two layouts, computed with bitsandbytes
- int8.py: 8-bit codes in their two layouts
- encode.py: from a matrix to NF4 codes and scales, fast
- bnb_format.py: reads matrices that bitsandbytes has quantized already
"""
