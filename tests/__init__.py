"""The tests mirror the package; `models.py` has the tiny models, `conftest.py` the fixtures."""
