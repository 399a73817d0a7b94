"""The published name of the Trainer: it is transformers' own.

A quantized model trains its adapters there as any other does. `llmtools finetune` does more: completion-only losses,
answers that are never cut, runs that resume to the same bits.
"""

from __future__ import annotations

from transformers import Trainer

__all__ = ["Trainer"]
