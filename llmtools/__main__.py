"""``python -m llmtools`` is ``llmtools``."""

import sys

from .cli.app import main

sys.exit(main())
