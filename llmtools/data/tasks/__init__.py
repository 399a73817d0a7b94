"""Tasks: what to train on, in which words, and how an answer is judged. One file each; see `base.Task`."""

from . import perplexity as _perplexity
from . import text as _text
from .base import Task, Template, make_task, tasks

__all__ = ["Task", "Template", "make_task", "tasks"]

del _perplexity, _text  # imported so that they register
