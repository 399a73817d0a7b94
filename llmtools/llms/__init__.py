"""Compatibility layer: models under the published import path. See ``docs/coming-from-llmtools.md``."""
