"""``python -m llmtools`` is ``llmtools``."""

import sys

from .cli.main import main

sys.exit(main())
