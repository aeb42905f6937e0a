"""An installed model at rest, which engine and experts read.

- families/: the families of models, each a description
- matrix/: matrices in 16 bits and in each quantization type
- format/: the format on disk of an installed model
"""
