"""External formats, one file each: `reading` opens their checkpoints as ours, `writing` writes ours as theirs.

`base.Format` says what a format is; `formats` is the registry, with the entry point ``llmtools.formats``.
"""

from . import awq, bitsandbytes, compressed_tensors, gguf, gptq, hqq, quip_sharp
from .base import Format, formats

__all__ = ["Format", "formats"]

del awq, bitsandbytes, compressed_tensors, gguf, gptq, hqq, quip_sharp  # imported so that they register
