"""Data: calibration windows, tasks to train on and to evaluate with, generation, and the measures."""

from .calibration import calibration, text_ids
from .metrics import Perplexity, perplexity
from .sad import TrainSAD
from .tasks import Task, tasks

__all__ = ["Perplexity", "Task", "TrainSAD", "calibration", "perplexity", "tasks", "text_ids"]
