"""Compatibility layer: finetuning under the published import paths. See ``docs/coming-from-llmtools.md``."""
