"""Grids: `affine` (uniform), `codebook` (NF4)."""
