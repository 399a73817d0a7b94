"""``python -m llmtools.cli`` is ``llmtools``."""

import sys

from .main import main

sys.exit(main())
