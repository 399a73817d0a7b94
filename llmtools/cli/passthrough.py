"""``llmtools serve`` and ``llmtools chat``: transformers' own commands, in a process that has imported llmtools.

That import is all there is to it: it teaches transformers to open our checkpoints. Options, endpoints and messages are
transformers'; see ``llmtools serve --help``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ..errors import InputError

SUMMARIES = {
    "serve": "transformers' server (OpenAI's API) for our checkpoints, too",
    "chat": "transformers' chat in the terminal, with a server that runs",
}

NEEDS = {"serve": ("fastapi", "uvicorn", "openai", "pydantic"), "chat": ("rich",)}
"""what transformers' command imports, beyond what transformers itself needs"""


def run(command: str, args: Sequence[str]) -> int:
    """Runs transformers' `command` with these arguments; returns its exit code.

    Raises InputError where transformers has no such command, or something that it needs is not installed.
    """
    missing = [module for module in NEEDS[command] if find_spec(module) is None]
    if missing:
        raise InputError(f"{command} needs {', '.join(missing)}: pip install 'llmtools[serve]'")
    for arg in args:
        if _holds(arg, "adapter_config.json") and not _holds(arg, "config.json"):
            raise InputError(
                f"{arg} is an adapter, and {command} takes whole models; merge it first: llmtools export "
                f"--adapter {arg} --format dense --out MERGED"
            )
    app = _app(command)
    hook = sys.excepthook
    try:
        app(args=[command, *args], prog_name="llmtools")
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except ValueError as error:  # transformers' word for what the user can mend, such as a server that is not there
        raise InputError(f"{error}") from error
    finally:
        sys.excepthook = hook  # typer replaces it
    return 0


def _holds(folder: str, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))  # false, too, for prose that no folder can be called


def _app(command: str) -> Any:
    """transformers' command line, if it has `command`."""
    import transformers

    reason = ""
    try:
        if find_spec(f"transformers.cli.{command}") is not None:
            from transformers.cli.transformers import app

            return app
    except ImportError as error:
        reason = f" ({error})"
    raise InputError(
        f"transformers {transformers.__version__} has no command {command!r} that can be borrowed{reason}; "
        "pip install 'transformers>=5.16,<6', or answer prompts with `llmtools generate`"
    )
