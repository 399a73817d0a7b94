"""Tasks: data to train on, a prompt template, and a score. One file each; see `base.Task`."""

from . import alpaca, bbh, json_answers, mnli, perplexity, samsum, text
from .base import Task, Template, make_task, tasks

__all__ = ["Task", "Template", "make_task", "tasks"]

del alpaca, bbh, json_answers, mnli, perplexity, samsum, text  # imported so that they register
