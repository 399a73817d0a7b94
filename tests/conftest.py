"""What every test relies on: no network, a seed, and uninitialised memory that shows.

`torch.empty` is filled with NaN (or the largest integer) before each test, so that code which reads what it never wrote
fails at once instead of now and then.
"""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["LLMTOOLS_PRODUCTS"] = "default"  # results must not depend on a measurement

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Seeds every generator, and makes `torch.empty` return NaN."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def stories() -> Path:
    """The folder of the real pretrained model that ships with the demo: LLaMA, 260 thousand parameters."""
    return REPOSITORY / "demo" / "assets" / "stories260K"


@pytest.fixture(scope="session")
def tinystories() -> Path:
    """The folder of `train.txt` and `held_out.txt`: text of the kind that the `stories` model was trained on."""
    return REPOSITORY / "demo" / "assets" / "tinystories"


@pytest.fixture(scope="session")
def wikitext2() -> Path:
    """The folder of `train.txt` and `test.txt`: text of a domain that the `stories` model does not know."""
    return REPOSITORY / "demo" / "assets" / "wikitext2"
