"""The command line: `verbs` are the commands, `app` runs one, `legacy` has the older options."""

from .app import main

__all__ = ["main"]
