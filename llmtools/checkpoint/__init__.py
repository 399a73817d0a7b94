"""Checkpoints as folders: writing and opening them, what was run, the model card, upload."""
