"""``python -m llmtools.cli`` is ``llmtools``."""

import sys

from .app import main

sys.exit(main())
