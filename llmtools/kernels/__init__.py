"""Pure functions on tensors, one folder an op; they know bits and tables, not models.

A folder's docstring says what its op computes, with shapes. Beside the folders, `ops` registers them, `build` builds
their C, which shares `native.h`, and `triton_common` is what their GPU kernels share.
"""
