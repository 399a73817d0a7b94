"""``python -m llmtools`` is ``llmtools``."""

import sys

from .cli import main

sys.exit(main())
