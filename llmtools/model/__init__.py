"""Whole networks: find their blocks, stream text through them, quantize them, write and open checkpoints."""
