"""Measurements: each number with its limit and its baselines, in one run."""
