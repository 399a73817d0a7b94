"""Pure functions on tensors, one folder an operation; they know bits and tables, not models.

`bits` packs codes in a bit stream · `affine` decodes uniform grids · `codebook` decodes table lookups ·
`lattice` encodes and decodes QuIP#'s blocks of eight · `hadamard` rotates vectors of any size. `grouped` is the C of
`affine` and `codebook`.
"""
