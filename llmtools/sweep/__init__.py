"""The recipes over a grid of variants: runs, their cache, memory, and the report."""
