"""External checkpoint formats, one file each: `reading` opens their checkpoints, `writing` exports models to them.

`base.Format` is the interface of a format; `formats` the registry, with the entry point ``llmtools.formats``.
"""

from . import awq, bitsandbytes, compressed_tensors, exl3, gguf, gptq, hqq, mxfp4, qtip, quip_sharp
from .base import Format, formats

__all__ = ["Format", "formats"]

del (
    awq,
    bitsandbytes,
    compressed_tensors,
    exl3,
    gguf,
    gptq,
    hqq,
    mxfp4,
    qtip,
    quip_sharp,
)  # imported so that they register
