"""A matrix, dense or 4-bit: how it is stored and computed.

- linear.py: y = x W^T, dense or 4-bit
- nf4.py: 4-bit codes, their two layouts, bitsandbytes' matmul
- encode.py: NF4 codes and scales of a matrix, fast
- bnb_format.py: matrices that bitsandbytes has quantized already
"""
