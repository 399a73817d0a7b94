"""A command starts faster where Python's cyclic collector rests while libraries are imported.

Importing transformers makes some million objects that live as long as the process. The collector (module `gc`) looks at
them again and again on the way, for some fifth of the time of the import, and at all of them in each full collection
later. So the command line lets it rest, and what opens a model says when the libraries are there: what exists then is
put aside for good (`gc.freeze`), and the collector works as ever. A Python program that calls the recipes itself is
left as it is.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_resting = False


@contextmanager
def collector_resting() -> Iterator[None]:
    """Lets the collector rest in the block, until `libraries_loaded`. Does nothing where it is off already."""
    global _resting
    if not gc.isenabled():
        yield
        return
    gc.disable()
    _resting = True
    try:
        yield
    finally:
        _resting = False
        gc.enable()


def libraries_loaded() -> None:
    """Ends the collector's rest, if it rests, with all objects of now put aside."""
    global _resting
    if _resting:
        _resting = False
        gc.freeze()
        gc.enable()
