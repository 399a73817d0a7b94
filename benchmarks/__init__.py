"""Measurements: a number beside its limit and its peers, in one run."""
